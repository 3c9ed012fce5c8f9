"""One SGLang process's speculation decided by a controller: batch information in, a shape out.

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
    """What every rank of a process group does in the next step."""

    shape: int
    """Index into the shapes."""
    gates: tuple[float, ...] = ()
    """At index d: least best-path probability to draft past depth d; 0 for no gate."""


@dataclass
class Counts:
    """What was done so far, true under a changing budget. Written by `Steering` alone."""

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
    """Times that the controller raised; where it was to decide, plain decoding instead."""
    lost: int = 0
    """Launched steps whose report never came."""


@dataclass(frozen=True)
class Flight:
    """A step that was launched."""

    load: LoadView
    plan: SpecPlan
    shape: Shape
    decided: bool
    """Its plan was made for it, rather than repeated."""
    timed: bool
    """Nothing else was run between the step before and this one."""


class Steering:
    """Plans each step with the controller and reports it back.

    Budgets are strict: a shape is only taken where its nodes over the whole batch fit the plan's budget.
    `top_k` is SGLang's children a node: 1 asks the controller's `extend` and `select` for a chain
    (`acceptance.chain_nodes`), above 1 the plan alone decides and its gates run on the device.
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
        self._survival = AcceptanceTracker(max(1, *(shape.steps for shape in shapes)))
        self._flights: deque[Flight] = deque()
        self._open: Flight | None = None  # the decision that is not yet reported
        self._plan = AUTOREGRESSIVE
        self._nodes = 0  # nodes a request that the plan in force is worth
        self._late: list[StepReport] = []  # of repeats that ended while a newer decision was open
        self._broken = True  # something else ran since the last launch
        self._end: float | None = None  # when the last step was complete
        self._slowness = 1.0  # measured over predicted seconds of the last timed step
        self._last: int | None = None

    def interrupted(self) -> None:
        """Something other than a decode step was run: the next step's duration can't be told."""
        self._broken = True

    def launch(self, load: LoadView) -> Decision:
        """The shape of the step that is about to run. Never raises: where the controller does, plain decoding."""
        decided = self._open is None
        if decided:
            self._decide(load)
        index = self._fit(load.batch_size)
        shape = self.shapes[index]
        flight = Flight(load, self._effective(shape), shape, decided, not self._broken)
        self._flights.append(flight)
        self._open = flight if decided else self._open
        self._broken = False
        self.counts.switches += self._last is not None and index != self._last
        self._last = index
        return Decision(index, tuple(self._plan.gate(depth) or 0.0 for depth in range(shape.steps)))

    def complete(self, accepts: Sequence[int], batch: int) -> None:
        """The oldest launched step is done; `accepts` are the drafted tokens accepted, one number a request."""
        while self._flights and self._flights[0].load.batch_size != batch:
            self._lose(self._flights.popleft())
        if not self._flights:
            self._end = None
            return
        flight = self._flights.popleft()
        report = self._report(flight, accepts)
        self._count(report)
        self._survival.observe(report.reached_by_depth, report.accepted_by_depth)
        if flight is self._open:
            self._open = None
            self._tell(report, *self._late)
            self._late.clear()
        elif self._open is None:
            self._tell(report)
        else:
            self._late.append(report)

    def _decide(self, load: LoadView) -> None:
        most = max((s for s in self.shapes if s.allows(load.batch_size)), key=lambda s: s.nodes)
        self.counts.decisions += 1
        try:
            self._plan = self.controller.plan(replace(load, max_nodes=most.nodes))
            self._nodes = self._worth(self._plan, load.batch_size, most.steps)
        except Exception:  # a server must go on, whatever a controller does
            self._failed("decide; decoding plainly until it can")
            self._plan, self._nodes = AUTOREGRESSIVE, 0

    def _tell(self, *reports: StepReport) -> None:
        try:
            for report in reports:
                self.controller.observe(report)
        except Exception:  # as above
            self._failed("learn from a step")

    def _failed(self, what: str) -> None:
        """To be called while the error is handled; the first one is logged."""
        if not self.counts.failures:
            log.exception("controller %r can't %s", self.controller.name, what)
        self.counts.failures += 1

    def _worth(self, plan: SpecPlan, batch: int, deepest: int) -> int:
        """Nodes a request that a plan is worth; for chains also no more than its depth."""
        if not plan.speculates or not deepest:
            return 0
        if self._top_k > 1:
            return plan.budget // batch
        levels = min(plan.max_depth, deepest)
        return min(levels, chain_nodes(self.controller, plan, self._survival, batch, levels) // batch)

    def _fit(self, batch: int) -> int:
        """The largest shape within the plan in force; plain decoding always is."""
        plan, nodes = self._plan, min(self._nodes, self._plan.budget // max(1, batch))
        depth = plan.max_depth if plan.speculates else 0
        fits = (i for i in self._by_size if self.shapes[i].allows(batch))
        return next(i for i in fits if self.shapes[i].steps <= depth and self.shapes[i].nodes <= nodes)

    def _effective(self, shape: Shape) -> SpecPlan:
        """The plan as SGLang carries it out."""
        if not shape.steps:
            return AUTOREGRESSIVE
        return replace(self._plan, max_depth=shape.steps, width=self._top_k, nested=False)

    def _report(self, flight: Flight, accepts: Sequence[int]) -> StepReport:
        batch, shape, levels = flight.load.batch_size, flight.shape, range(flight.shape.steps)
        level = self._top_k + max(0, shape.steps - 1) * self._top_k**2 if shape.steps else 0
        accepted = sum(accepts)
        return StepReport(
            load=flight.load,
            plan=flight.plan,
            outputs=(),
            drafted=batch * level,
            verified=batch * shape.nodes,
            accepted=accepted,
            committed=accepted + batch,
            reached_by_depth=tuple(sum(n >= depth for n in accepts) for depth in levels),
            accepted_by_depth=tuple(sum(n > depth for n in accepts) for depth in levels),
            times=self._times(flight),
            drafting=(batch,) * shape.steps,
        )

    def _times(self, flight: Flight) -> PhaseTimes:
        """The step's seconds, split as the cost profile has it.

        A step took from the end of the step before to its own, if nothing else ran between the two;
        otherwise it counts as slow as the last one that could be timed.
        """
        now, before = self._clock(), self._end
        self._end = now
        load, plan = flight.load, flight.plan
        seconds = now - before if flight.timed and before is not None else None
        if self._profile is None:
            return PhaseTimes(verify=seconds or 0.0)
        nodes = load.batch_size * flight.shape.nodes
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

    def _lose(self, flight: Flight) -> None:
        self.counts.lost += 1
        self._end = None
        if flight is self._open:
            self._open = None
            self._tell(*self._late)
            self._late.clear()
