"""A controller that a server can trust: a fallback decides wherever it fails.

Nothing that the guarded controller does (raise, return nonsense, be slow, hang) reaches the engine. Rules of this
package run in the engine's thread; what is learned or foreign runs in a thread of its own, with a deadline.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Controller, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.server.guard.background_caller import BackgroundCaller
from echo_rl.server.guard.lazy_observer import MOST_REPORTS, show_reports
from echo_rl.server.guard.validation import Limits, UnsoundDecision, check_mask, check_plan, check_selection, clamp_plan

CAUSES = ("exception", "nan", "deadline", "invalid")
MOST_FAULTS = 20
"""Faults without a clean step between them after which a controller is retired."""
HANG_DEADLINES = 8.0
"""Deadlines after which a call that has not returned counts as hung."""

ALL_METHODS = frozenset({"plan", "extend", "select"})
log = logging.getLogger(__name__)


@runtime_checkable
class LearnedController(Controller, Protocol):
    """A controller whose plan is a model's, and a rule's where the model's numbers are unusable.

    Its gates and selection are rules of this package. `controllers.policy.ppo.Ppo` is one.
    """

    fallbacks: int
    """Decisions that the rule took."""

    @property
    def decision_steps(self) -> int:
        """Returns the decoding steps that one decision stands for."""
        ...


def threaded_methods(controller: Controller) -> frozenset[str]:
    """Returns the methods of a controller that run in a thread of its own.

    These are none of an analytic rule of this package; only the plan of a learned policy, whose gates and selection are
    ECHO's; and all of anything else.
    """
    if isinstance(controller, LearnedController):
        return frozenset({"plan"})
    own = isinstance(controller, BaseController) and type(controller).__module__.startswith("echo_rl.controllers.")
    return frozenset() if own else ALL_METHODS


class Guarded:
    """Lets `controller` decide, and `fallback` wherever that fails, so that every decision is sound.

    A fault is a decision that raises, holds NaN, can't be carried out (see `validation`), or outlasts `deadline`
    seconds. The fallback then decides, after a faulty `plan` the whole step. While a call is overdue the fallback
    decides at once; one that has not returned after `HANG_DEADLINES` deadlines is abandoned with its thread and the
    controller retired for good, as it is after `MOST_FAULTS` faults in a row. Both observe every report; a controller
    that plans in its thread observes them just before its next plan, which saves a handoff.
    """

    def __init__(
        self,
        controller: Controller,
        fallback: Controller,
        deadline: float = 0.25,
        limits: Limits | None = None,
        threaded: frozenset[str] | None = None,
    ) -> None:
        self.name = controller.name
        self.fallbacks: dict[str, int] = dict.fromkeys(CAUSES, 0)
        """Decisions that the fallback took over, by cause; once retired, every step counts under that cause."""
        self.retired: str | None = None
        """The reason that the controller is retired and never decides again; None while it may."""
        self._controller: Controller | None = controller
        self._fallback, self._deadline, self._limits = fallback, deadline, limits or Limits()
        self._threaded = threaded_methods(controller) if threaded is None else threaded
        self._thread = BackgroundCaller(f"controller {self.name}")
        self._reports: deque[StepReport] = deque(maxlen=MOST_REPORTS)  # unobserved by one that plans in its thread
        self._overdue_since: float | None = None  # when the call that is overdue began
        self._retiring_cause = "invalid"
        self._logged: set[str] = set()
        self._consecutive_faults = 0
        self._policy = controller if isinstance(controller, LearnedController) else None
        self._seen_policy_fallbacks = 0  # its fallbacks that are counted already
        self._faulty_policy_steps = 0  # steps that its last fallback still decides
        self._load: LoadView | None = None
        self._fallback_planned = False  # the fallback planned this step
        self._faulty = False  # this step had a fault

    @property
    def overdue(self) -> bool:
        """Returns whether a call is past its deadline and may hang."""
        return self.retired is None and self._overdue_since is not None

    # ------------------------------------------------------------------------- decisions

    def plan(self, load: LoadView) -> SpecPlan:
        self._load, self._fallback_planned, self._faulty = load, False, False
        if not self._limits.drafter:
            return AUTOREGRESSIVE
        plan = self._ask(
            "plan", lambda controller: show_reports(self._reports, controller).plan(load), lambda p: check_plan(p, load)
        )
        if plan is None:
            plan = self._fallback_plan(load)
        return clamp_plan(plan, self._limits)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        mask: Tensor | None = None
        if not self._fallback_planned:
            mask = self._ask("extend", lambda c: c.extend(frontier, plan), lambda m: check_mask(m, frontier))
        if mask is None:
            check = partial(check_mask, frontier=frontier)
            mask = self._substitute(lambda: self._fallback.extend(frontier, plan), check, lambda: frontier.alive)
        return mask

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        assert self._load is not None, "select() before plan()"
        check = partial(check_selection, forest=forest, plan=plan, max_nodes=self._load.max_nodes)
        if not self._fallback_planned:
            selection = self._ask("select", lambda c: c.select(forest, plan), check)
            if selection is not None:
                return selection
            self._fallback_plan(self._load)  # a rule selects by the load it planned for
        chosen: Selection = self._substitute(
            lambda: self._fallback.select(forest, plan), check, lambda: _no_selection(forest)
        )
        return chosen

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """Returns those of the controller that decides this step; None where it has gates or a selection of its own."""
        if self._fallback_planned:
            decides: Controller | None = self._fallback
        else:
            decides = None if self.overdue or "select" in self._threaded else self._controller
        return decides.score_powers(plan) if isinstance(decides, BaseController) else None

    def observe(self, report: StepReport) -> None:
        try:
            self._fallback.observe(report)
        except Exception:
            self._log_once("the fallback's observe", "raised", exc_info=True)
        controller = self._controller
        if controller is None:
            return
        if "plan" in self._threaded:
            self._reports.append(report)
        else:
            try:
                controller.observe(report)
            except Exception as error:
                self._fault("exception", f"observe() raised {type(error).__name__}: {error}")
        self._end_step()

    def _end_step(self) -> None:
        """Ends a step; where the controller was asked and nothing failed, earlier faults are forgotten."""
        if self._load is not None:
            if not self._faulty and not self._faulty_policy_steps:
                self._consecutive_faults = 0
            self._faulty_policy_steps = max(0, self._faulty_policy_steps - 1)
        self._load = None

    # ------------------------------------------------------------------------- retiring

    def retire(self, cause: str, why: str) -> None:
        """Retires the controller, which is never asked again."""
        if self.retired is None:
            self.retired, self._retiring_cause = why, cause
            log.warning("controller '%s' is retired: %s", self.name, why)
            self.close()

    def close(self) -> None:
        """Releases the controller and its thread; the fallback takes every further decision."""
        self._controller = self._policy = None
        self._reports.clear()
        self._thread.close()

    # ------------------------------------------------------------------------- asking

    def _ask(self, method: str, call: Callable[[Controller], Any], check: Callable[[Any], None]) -> Any:
        """Returns the controller's sound decision, or None where the fallback must decide."""
        controller = self._controller
        if controller is None:
            self.fallbacks[self._retiring_cause] += 1
            return None
        if self._overdue_since is not None and not self._is_back():
            self.fallbacks["deadline"] += 1
            self._faulty = True
            return None
        try:
            run = self._wait_for if method in self._threaded else self._time
            value = run(partial(call, controller))
            check(value)
            self._check_policy_fallbacks()
        except UnsoundDecision as fault:
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
            self._overdue_since = began
            raise UnsoundDecision("deadline", f"no decision within {self._deadline:g} s")
        return answer.result()

    def _time(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = call()
        seconds = time.monotonic() - began
        if seconds > self._deadline:
            raise UnsoundDecision("deadline", f"a decision took {seconds:.2f} s of {self._deadline:g} s")
        return value

    def _is_back(self) -> bool:
        """Returns whether the overdue call is back, and drops its answer. Retires a controller that hangs."""
        assert self._overdue_since is not None
        if self._thread.wait(0.0) is not None:
            self._overdue_since = None
            return True
        out = time.monotonic() - self._overdue_since
        if out > HANG_DEADLINES * self._deadline:
            self.retire("deadline", f"a decision has not returned for {out:.1f} s")
        return False

    def _check_policy_fallbacks(self) -> None:
        """Counts a fault where the policy's numbers were unusable and ECHO decided, though that decision is sound."""
        if self._policy is not None and self._policy.fallbacks > self._seen_policy_fallbacks:
            self._seen_policy_fallbacks, self._faulty_policy_steps = self._policy.fallbacks, self._policy.decision_steps
            self._fault("nan", "the policy's numbers were unusable; ECHO decided")

    def _fault(self, cause: str, message: str) -> None:
        self.fallbacks[cause] += 1
        self._faulty = True
        self._consecutive_faults += 1
        self._log_once(cause, message)
        if self._consecutive_faults >= MOST_FAULTS:
            self.retire(cause, f"{self._consecutive_faults} faults in a row, the last: {message}")

    # ------------------------------------------------------------------------- falling back

    def _fallback_plan(self, load: LoadView) -> SpecPlan:
        self._fallback_planned = True
        plan: SpecPlan = self._substitute(
            lambda: self._fallback.plan(load), lambda p: check_plan(p, load), lambda: AUTOREGRESSIVE
        )
        return plan

    def _substitute(self, call: Callable[[], Any], check: Callable[[Any], None], last_resort: Callable[[], Any]) -> Any:
        """Returns the fallback's decision; where even that is unsound, the last resort, which is no speculation."""
        try:
            value = call()
            check(value)
        except Exception as error:
            self._log_once(
                "the fallback", f"failed too ({type(error).__name__}: {error}); plain decoding", exc_info=True
            )
            return last_resort()
        return value

    def _log_once(self, key: str, message: str, exc_info: bool = False) -> None:
        if key not in self._logged:
            self._logged.add(key)
            log.warning(
                "controller '%s', %s: %s (further ones are only counted)", self.name, key, message, exc_info=exc_info
            )


def _no_selection(forest: Forest) -> Selection:
    empty = forest.tokens.new_zeros(0)
    return Selection(forest.tokens.new_zeros(forest.batch_size), empty, empty, empty)
