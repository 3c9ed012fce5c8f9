"""Decides one SGLang process's speculation by a controller: takes a batch's load, gives a shape.

Knows nothing of SGLang's classes. `launch` is called before a decode step is run and `complete` when its
acceptance is known. SGLang runs a step ahead (its overlap scheduler), so a step is often launched before
the one before it is complete; a controller is promised plan, then observe, so:

* a step launched while a decision is unreported repeats that decision, within its budget;
* the repeat's report is handed on after the decision's own, before the next plan.

Only the leading rank holds a `Steering`; the others receive its `Decision` (`ranks`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from echo_rl.contracts import AUTOREGRESSIVE, Controller, LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.costs.profile import CostProfile
from echo_rl.integrations.sglang.acceptance import AcceptanceTracker, chain_nodes
from echo_rl.integrations.sglang.settings import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The next step of every rank of a process group."""

    shape: int
    """The index into the shapes."""
    gates: tuple[float, ...] = ()
    """Index d holds the least best-path probability to draft past depth d; 0 means no gate."""


@dataclass
class Counts:
    """The totals so far, which hold under a changing budget. Only `Steering` writes them."""

    steps: int = 0
    plain_steps: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    committed: int = 0
    budget: int = 0
    decisions: int = 0
    switches: int = 0
    failures: int = 0
    """The times that the controller raised; where it was to decide, the step decoded plainly."""
    lost: int = 0
    """The launched steps whose report never came."""


@dataclass(frozen=True)
class LaunchedStep:
    """A step that was launched and is not yet complete."""

    load: LoadView
    plan: SpecPlan
    shape: Shape
    timed: bool
    """True where nothing else was run between the step before and this one."""


class Steering:
    """Plans each step with the controller and reports it back.

    Budgets are strict: a shape is only taken where its nodes over the whole batch fit the plan's budget.
    `top_k` is the number of children that SGLang drafts of a node: 1 asks the controller's `extend` and `select`
    for a chain (`acceptance.chain_nodes`), above 1 the plan alone decides and its gates run on the device.
    """

    def __init__(
        self,
        controller: Controller,
        shapes: Sequence[Shape],
        top_k: int = 1,
        profile: CostProfile | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.controller, self.shapes, self.counts = controller, tuple(shapes), Counts()
        self._top_k, self._profile, self._clock = top_k, profile, clock
        self._by_size = sorted(range(len(shapes)), key=lambda i: (shapes[i].width, shapes[i].steps), reverse=True)
        self._acceptance = AcceptanceTracker(max(1, *(shape.steps for shape in shapes)))
        self._launched: deque[LaunchedStep] = deque()
        self._unreported: LaunchedStep | None = None  # the newest step with a plan of its own, until it is reported
        self._current_plan = AUTOREGRESSIVE
        self._nodes_per_request = 0  # of the plan in force
        self._held_reports: list[StepReport] = []  # of repeats that ended while a newer decision was unreported
        self._interrupted = True  # something else ran since the last launch
        self._last_end: float | None = None  # when the last step was complete
        self._slowness = 1.0  # measured over predicted seconds of the last timed step
        self._last_shape: int | None = None

    def interrupt(self) -> None:
        """Takes note that something other than a decode step was run: the next step's duration can't be told."""
        self._interrupted = True

    def launch(self, load: LoadView) -> Decision:
        """Decides the shape of the step that is about to run. Where the controller raises, the step decodes plainly."""
        decided = self._unreported is None
        if decided:
            self._decide(load)
        index = self._largest_fitting(load.batch_size)
        shape = self.shapes[index]
        step = LaunchedStep(load, self._effective(shape), shape, not self._interrupted)
        self._launched.append(step)
        self._unreported = step if decided else self._unreported
        self._interrupted = False
        self.counts.switches += self._last_shape is not None and index != self._last_shape
        self._last_shape = index
        return Decision(index, tuple(self._current_plan.gate(depth) or 0.0 for depth in range(shape.steps)))

    def complete(self, accepts: Sequence[int], batch: int) -> None:
        """Ends the oldest launched step; `accepts` holds the number of drafted tokens accepted of each request."""
        while self._launched and self._launched[0].load.batch_size != batch:
            self._drop(self._launched.popleft())
        if not self._launched:
            self._last_end = None
            return
        step = self._launched.popleft()
        report = self._report(step, accepts)
        self._count(report)
        self._acceptance.observe(report.reached_by_depth, report.accepted_by_depth)
        if step is self._unreported:
            self._unreported = None
            self._hand_on(report, *self._held_reports)
            self._held_reports.clear()
        elif self._unreported is None:
            self._hand_on(report)
        else:
            self._held_reports.append(report)

    def _decide(self, load: LoadView) -> None:
        most = max((s for s in self.shapes if s.allows(load.batch_size)), key=lambda s: s.nodes)
        self.counts.decisions += 1
        try:
            self._current_plan = self.controller.plan(replace(load, max_nodes=most.nodes))
            self._nodes_per_request = self._planned_nodes(self._current_plan, load.batch_size, most.steps)
        except Exception:  # a server must go on, whatever a controller does
            self._count_failure("decide; decoding plainly until it can")
            self._current_plan, self._nodes_per_request = AUTOREGRESSIVE, 0

    def _hand_on(self, *reports: StepReport) -> None:
        try:
            for report in reports:
                self.controller.observe(report)
        except Exception:  # a server must go on, whatever a controller does
            self._count_failure("learn from a step")

    def _count_failure(self, what: str) -> None:
        """Counts an error that is being handled, and logs the first."""
        if not self.counts.failures:
            log.exception("controller %r can't %s", self.controller.name, what)
        self.counts.failures += 1

    def _planned_nodes(self, plan: SpecPlan, batch: int, deepest: int) -> int:
        """Returns how many nodes a request the plan affords; for chains no more than its depth."""
        if not plan.speculates or not deepest:
            return 0
        if self._top_k > 1:
            return plan.budget // batch
        levels = min(plan.max_depth, deepest)
        return min(levels, chain_nodes(self.controller, plan, self._acceptance, batch, levels) // batch)

    def _largest_fitting(self, batch: int) -> int:
        """Returns the index of the largest shape within the plan in force; plain decoding always is."""
        plan, nodes = self._current_plan, min(self._nodes_per_request, self._current_plan.budget // max(1, batch))
        depth = plan.max_depth if plan.speculates else 0
        allowed = (i for i in self._by_size if self.shapes[i].allows(batch))
        return next(i for i in allowed if self.shapes[i].steps <= depth and self.shapes[i].nodes <= nodes)

    def _effective(self, shape: Shape) -> SpecPlan:
        """Returns the plan as SGLang carries it out."""
        if not shape.steps:
            return AUTOREGRESSIVE
        return replace(self._current_plan, max_depth=shape.steps, width=self._top_k, nested=False)

    def _report(self, step: LaunchedStep, accepts: Sequence[int]) -> StepReport:
        batch, shape, levels = step.load.batch_size, step.shape, range(step.shape.steps)
        level = self._top_k + max(0, shape.steps - 1) * self._top_k**2 if shape.steps else 0
        accepted = sum(accepts)
        return StepReport(
            load=step.load,
            plan=step.plan,
            outputs=(),
            drafted=batch * level,
            verified=batch * shape.nodes,
            accepted=accepted,
            committed=accepted + batch,
            reached_by_depth=tuple(sum(n >= depth for n in accepts) for depth in levels),
            accepted_by_depth=tuple(sum(n > depth for n in accepts) for depth in levels),
            times=self._times(step),
            drafting=(batch,) * shape.steps,
        )

    def _times(self, step: LaunchedStep) -> PhaseTimes:
        """Returns the step's seconds, split as the cost profile has it.

        A step took from the end of the step before to its own, if nothing else ran between the two;
        otherwise it counts as slow as the last one that could be timed.
        """
        now, before = self._clock(), self._last_end
        self._last_end = now
        load, plan = step.load, step.plan
        seconds = now - before if step.timed and before is not None else None
        if self._profile is None:
            return PhaseTimes(verify=seconds or 0.0)
        nodes = load.batch_size * step.shape.nodes
        verify = self._profile.verify_seconds(load.batch_size, load.batch_size + nodes, load.mean_context)
        draft = self._profile.draft_seconds(load.batch_size, plan.width, plan.max_depth) if nodes else 0.0
        rest = self._profile.overhead_seconds(load.batch_size, nodes, nodes > 0)
        if seconds is not None and seconds > 0.0:
            self._slowness = seconds / (verify + draft + rest)
        return PhaseTimes(draft=draft * self._slowness, verify=verify * self._slowness, commit=rest * self._slowness)

    def _count(self, report: StepReport) -> None:
        counts = self.counts
        counts.steps += 1
        counts.plain_steps += not report.plan.speculates
        counts.drafted += report.drafted
        counts.verified += report.verified
        counts.accepted += report.accepted
        counts.committed += report.committed
        counts.budget += report.plan.budget

    def _drop(self, step: LaunchedStep) -> None:
        self.counts.lost += 1
        self._last_end = None
        if step is self._unreported:
            self._unreported = None
            self._hand_on(*self._held_reports)
            self._held_reports.clear()
