"""A controller that a server can trust: another one decides wherever it fails.

Nothing that the wrapped controller does - raise, answer nonsense, be slow, hang - reaches the engine.
Rules of this package run where they are called; what is learned or foreign runs in a thread of its
own and is waited for only so long.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Controller, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.policy.ppo import Ppo
from echo_rl.server.guard.background_caller import BackgroundCaller
from echo_rl.server.guard.lazy_observer import MOST_REPORTS, show
from echo_rl.server.guard.validation import Limits, Unsound, check_mask, check_plan, check_selection, cut

CAUSES = ("exception", "nan", "deadline", "invalid")
MOST_FAULTS = 20
"""Faults without a clean step between them after which a controller never decides again."""
PATIENCE = 8.0
"""Deadlines after which a call that is still out counts as hung."""

EVERYTHING = frozenset({"plan", "extend", "select"})
log = logging.getLogger(__name__)


def kept_aside(controller: Controller) -> frozenset[str]:
    """The decisions of a controller that need a thread of their own.

    None of an analytic rule of this package; of a learned policy only its plan, since gates and
    scheduler are ECHO's; all of anything else.
    """
    if isinstance(controller, Ppo):
        return frozenset({"plan"})
    own = isinstance(controller, BaseController) and type(controller).__module__.startswith("echo_rl.controllers.")
    return frozenset() if own else EVERYTHING


class Guarded:
    """Lets `controller` decide, and `fallback` wherever that fails, so that every decision is sound.

    A fault is a decision that raises, holds NaN, can't be carried out (see `soundness`), or takes
    longer than `deadline` seconds. The fallback then decides, after a faulty `plan` the whole step.
    While a call is overdue the fallback decides at once; one that isn't back after `PATIENCE` deadlines
    is abandoned with its thread and the controller retired for good, and so it is after `MOST_FAULTS`
    faults in a row. Both see every report; a controller that plans aside sees it just before its next
    plan, which saves a handoff.
    """

    def __init__(
        self,
        controller: Controller,
        fallback: Controller,
        deadline: float = 0.25,
        limits: Limits | None = None,
        aside: frozenset[str] | None = None,
    ) -> None:
        self.name = controller.name
        self.fallbacks: dict[str, int] = dict.fromkeys(CAUSES, 0)
        """Decisions that the fallback took over, by cause; once retired, every step counts under its cause."""
        self.retired: str | None = None
        """Why the controller never decides again, if so."""
        self._controller: Controller | None = controller
        self._fallback, self._deadline, self._limits = fallback, deadline, limits or Limits()
        self._aside = kept_aside(controller) if aside is None else aside
        self._thread = BackgroundCaller(f"controller {self.name}")
        self._reports: deque[StepReport] = deque(
            maxlen=MOST_REPORTS
        )  # not yet shown to a controller that decides aside
        self._out_since: float | None = None  # when the call that is overdue began
        self._retiring_cause = "invalid"
        self._logged: set[str] = set()
        self._streak = 0
        self._policy = controller if isinstance(controller, Ppo) else None
        self._stood_in = 0  # decisions that the policy left to its own substitute
        self._tainted = 0  # steps for which the last of them stands
        self._load: LoadView | None = None
        self._yielded = False  # the fallback planned this step
        self._faulty = False  # this step had a fault

    @property
    def overdue(self) -> bool:
        """Whether a call is out past its deadline: nobody knows yet whether it hangs."""
        return self.retired is None and self._out_since is not None

    # ------------------------------------------------------------------------- decisions

    def plan(self, load: LoadView) -> SpecPlan:
        self._load, self._yielded, self._faulty = load, False, False
        if not self._limits.drafter:
            return AUTOREGRESSIVE
        plan = self._ask(
            "plan", lambda controller: show(self._reports, controller).plan(load), lambda p: check_plan(p, load)
        )
        if plan is None:
            plan = self._plan_instead(load)
        return cut(plan, self._limits)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        mask: Tensor | None = None
        if not self._yielded:
            mask = self._ask("extend", lambda c: c.extend(frontier, plan), lambda m: check_mask(m, frontier))
        if mask is None:
            check = partial(check_mask, frontier=frontier)
            mask = self._substitute(lambda: self._fallback.extend(frontier, plan), check, lambda: frontier.alive)
        return mask

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        assert self._load is not None, "select() before plan()"
        check = partial(check_selection, forest=forest, plan=plan, max_nodes=self._load.max_nodes)
        if not self._yielded:
            selection = self._ask("select", lambda c: c.select(forest, plan), check)
            if selection is not None:
                return selection
            self._plan_instead(self._load)  # a rule selects by what it saw of the load
        chosen: Selection = self._substitute(
            lambda: self._fallback.select(forest, plan), check, lambda: _nothing(forest)
        )
        return chosen

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """Of whoever decides this step, where its gates and selection are this package's; else None."""
        if self._yielded:
            decides: Controller | None = self._fallback
        else:
            decides = None if self.overdue or "select" in self._aside else self._controller
        return decides.score_powers(plan) if isinstance(decides, BaseController) else None

    def observe(self, report: StepReport) -> None:
        try:
            self._fallback.observe(report)
        except Exception:
            self._log_once("the fallback's observe", "raised", exc_info=True)
        controller = self._controller
        if controller is None:
            return
        if "plan" in self._aside:
            self._reports.append(report)
        else:
            try:
                controller.observe(report)
            except Exception as error:
                self._fault("exception", f"observe() raised {type(error).__name__}: {error}")
        self._settle()

    def _settle(self) -> None:
        """A step in which it was asked is over: if nothing failed, earlier faults are forgotten."""
        if self._load is not None:
            if not self._faulty and not self._tainted:
                self._streak = 0
            self._tainted = max(0, self._tainted - 1)
        self._load = None

    # ------------------------------------------------------------------------- its end

    def retire(self, cause: str, why: str) -> None:
        """Never ask the controller again."""
        if self.retired is None:
            self.retired, self._retiring_cause = why, cause
            log.warning("controller '%s' is retired: %s", self.name, why)
            self.close()

    def close(self) -> None:
        """Let go of the controller and its thread; the fallback decides whatever is still asked."""
        self._controller = self._policy = None
        self._reports.clear()
        self._thread.close()

    # ------------------------------------------------------------------------- asking

    def _ask(self, method: str, call: Callable[[Controller], Any], check: Callable[[Any], None]) -> Any:
        """The controller's sound decision, or None where the fallback must decide."""
        controller = self._controller
        if controller is None:
            self.fallbacks[self._retiring_cause] += 1
            return None
        if self._out_since is not None and not self._is_back():
            self.fallbacks["deadline"] += 1
            self._faulty = True
            return None
        try:
            run = self._wait_for if method in self._aside else self._time
            value = run(partial(call, controller))
            check(value)
            self._look_for_stand_in()
        except Unsound as fault:
            self._fault(fault.cause, str(fault))
        except Exception as error:
            self._fault("exception", f"{method}() raised {type(error).__name__}: {error}")
        else:
            return value
        return None

    def _wait_for(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        self._thread.post(call)
        answer = self._thread.wait(self._deadline)
        if answer is None:
            self._out_since = began
            raise Unsound("deadline", f"no decision within {self._deadline:g} s")
        return answer.result()

    def _time(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = call()
        seconds = time.monotonic() - began
        if seconds > self._deadline:
            raise Unsound("deadline", f"a decision took {seconds:.2f} s of {self._deadline:g} s")
        return value

    def _is_back(self) -> bool:
        """Whether the overdue call has returned (its answer is dropped); retires the controller if it hangs."""
        assert self._out_since is not None
        if self._thread.wait(0.0) is not None:
            self._out_since = None
            return True
        out = time.monotonic() - self._out_since
        if out > PATIENCE * self._deadline:
            self.retire("deadline", f"a decision has not returned for {out:.1f} s")
        return False

    def _look_for_stand_in(self) -> None:
        """A policy whose numbers fail has ECHO decide by itself: a fault, though the decision is sound."""
        if self._policy is not None and self._policy.fallbacks > self._stood_in:
            self._stood_in, self._tainted = self._policy.fallbacks, self._policy.policy.repeat
            self._fault("nan", "the policy's numbers were unusable; ECHO decided")

    def _fault(self, cause: str, message: str) -> None:
        self.fallbacks[cause] += 1
        self._faulty = True
        self._streak += 1
        self._log_once(cause, message)
        if self._streak >= MOST_FAULTS:
            self.retire(cause, f"{self._streak} faults in a row, the last: {message}")

    # ------------------------------------------------------------------------- deciding instead

    def _plan_instead(self, load: LoadView) -> SpecPlan:
        self._yielded = True
        plan: SpecPlan = self._substitute(
            lambda: self._fallback.plan(load), lambda p: check_plan(p, load), lambda: AUTOREGRESSIVE
        )
        return plan

    def _substitute(self, call: Callable[[], Any], check: Callable[[Any], None], resort: Callable[[], Any]) -> Any:
        """The fallback's decision; where even that is unsound, the last resort, which is no speculation."""
        try:
            value = call()
            check(value)
        except Exception as error:
            self._log_once(
                "the fallback", f"failed too ({type(error).__name__}: {error}); plain decoding", exc_info=True
            )
            return resort()
        return value

    def _log_once(self, key: str, message: str, exc_info: bool = False) -> None:
        if key not in self._logged:
            self._logged.add(key)
            log.warning(
                "controller '%s', %s: %s (further ones are only counted)", self.name, key, message, exc_info=exc_info
            )


def _nothing(forest: Forest) -> Selection:
    empty = forest.tokens.new_zeros(0)
    return Selection(forest.tokens.new_zeros(forest.batch_size), empty, empty, empty)
