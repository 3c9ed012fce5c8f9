"""Replay of a trace as a backend: exact acceptance for any controller, measured costs for time.

One step asks the controller exactly what the live engine asks it, with the forests that the
drafter really proposed; only seconds are simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from echo_rl.codec import gates_asked
from echo_rl.contracts import (
    AUTOREGRESSIVE,
    Controller,
    Forest,
    LoadView,
    PhaseTimes,
    Request,
    RequestOutput,
    Selection,
    SpecPlan,
    StepReport,
)
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.errors import ConfigError, PlanViolation, RequestError
from echo_rl.replay.forests import accepted_nodes, reached_by_depth, recorded_forest, selected_levels
from echo_rl.replay.scheduler import CommittedStep, ReplayScheduler, ReplaySchedulerOptions, ScheduledStep
from echo_rl.replay.timing import Work, noise, step_phases
from echo_rl.replay.trace import Trace, key


@dataclass(frozen=True)
class ReplayOptions:
    limits: ReplaySchedulerOptions = field(default_factory=ReplaySchedulerOptions)
    noise: bool = True
    """Draw each step's time around the profile's, with its measured residual noise."""


class ReplayBackend:
    """A server in simulated time. Deterministic for a seed."""

    def __init__(
        self, trace: Trace, costs: BatchedCostProfile, options: ReplayOptions | None = None, seed: int = 0
    ) -> None:
        self.trace = trace
        self._costs, self._options = costs, options or ReplayOptions()
        self._scheduler = ReplayScheduler(trace, self._options.limits)
        self._generator = np.random.default_rng(seed)
        self._tickets: dict[str, int] = {}  # request id -> ticket
        self._names: dict[int, str] = {}  # and back
        self._scheduled: ScheduledStep | None = None  # of the prepared step
        self._now = 0.0

    @property
    def has_work(self) -> bool:
        return self._scheduler.in_flight() > 0

    def clock(self) -> float:
        """Simulated seconds."""
        return self._now

    def idle(self, until: float) -> None:
        """Let time pass without work."""
        self._now = max(self._now, until)

    def restart(self, seed: int) -> None:
        """Drop every request and begin at time 0 with this seed's noise."""
        self._scheduler.clear()
        self._tickets.clear()
        self._names.clear()
        self._scheduled = None
        self._generator, self._now = np.random.default_rng(seed), 0.0

    def add(self, request: Request) -> None:
        """Queue a recorded request. Raises `RequestError` where the trace doesn't hold it."""
        response = self.trace.index.get(key(request.prompt, request.params))
        if response is None:
            raise RequestError(f"request '{request.id}' is not in the trace; use `Trace.requests` or record it")
        if request.id in self._tickets:
            raise RequestError(f"request id '{request.id}' is in use; give every request its own")
        ticket = self._tickets[request.id] = self._scheduler.add(response)
        self._names[ticket] = request.id

    def cancel(self, request_id: str) -> None:
        """Drop a request. Unknown and finished ids are ignored."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            del self._names[ticket]
            self._scheduler.drop(ticket)
            self._scheduled = None

    def prepare(self) -> LoadView:
        """Form the coming step, see `Backend`. Raises `ConfigError` where there is no work."""
        return self._view(self._formed())

    def execute(self, plan: SpecPlan, controller: Controller) -> StepReport:
        """Serve the prepared step, see `Backend`. Raises `TraceError` where the trace lacks so deep or wide a plan."""
        step, self._scheduled = self._formed(), None
        load = self._view(step)
        plan = plan if load.batch_size else AUTOREGRESSIVE
        forest = recorded_forest(self.trace, step, plan, controller.extend) if plan.speculates else None
        selection = _select(controller, forest, plan, load.batch_size, load.max_nodes)
        accepted = accepted_nodes(selection)
        gain = self._scheduler.commit(step, accepted.numpy(), np.array([plan.speculates]))
        drafting = forest.drafting if forest is not None else ()
        report = StepReport(
            load=load,
            plan=plan,
            outputs=self._outputs(step, gain),
            drafted=int(forest.exists.sum()) if forest is not None else 0,
            verified=selection.size,
            accepted=int(accepted.sum()),
            committed=int(accepted.sum()) + load.batch_size,
            reached_by_depth=reached_by_depth(selection, accepted),
            accepted_by_depth=tuple(int((accepted > d).sum()) for d in range(selected_levels(selection))),
            times=self._times(step, plan, selection.size, drafting),
            drafting=drafting,
            confidence=forest.first_confidence if forest is not None else (),
        )
        self._now += report.times.total
        controller.observe(report)
        return report

    def step(self, controller: Controller) -> StepReport:
        """Both phases, with the controller's own plan between them."""
        load = self.prepare()
        return self.execute(controller.plan(load) if load.batch_size else AUTOREGRESSIVE, controller)

    def _formed(self) -> ScheduledStep:
        """The step that waits for its plan; formed now where none does."""
        if self._scheduled is None:
            if not self.has_work:
                raise ConfigError("a step was asked for with no request queued or running; add one first")
            self._scheduled = self._scheduler.schedule()
        return self._scheduled

    def _view(self, step: ScheduledStep) -> LoadView:
        """The load of the step as a controller sees it."""
        loads = step.loads
        return LoadView(
            batch_size=int(loads.batch[0]),
            prefill_tokens=int(loads.prefill[0]),
            waiting=int(loads.waiting[0]),
            mean_context=float(loads.context[0]),
            kv_used=float(loads.kv_used[0]),
            max_nodes=self._options.limits.max_nodes,
            arrived=int(loads.arrived[0]),
        )

    def _times(self, step: ScheduledStep, plan: SpecPlan, verified: int, drafting: tuple[int, ...]) -> PhaseTimes:
        levels = np.zeros((1, self.trace.max_depth))
        levels[0, : len(drafting)] = drafting
        work = Work(
            batch=step.loads.batch,
            context=step.loads.context,
            prefill=step.loads.prefill,
            verified=np.array([float(verified)]),
            width=np.array([float(plan.width)]),
            drafting=levels,
            unseen=step.unseen,
            asked=np.array([float(gates_asked(plan.gates, plan.max_depth, drafting))]),
        )
        phases = step_phases(self._costs, work)
        if self._options.noise:
            phases = phases.times(noise([self._generator], self._costs.scalar("noise")))
        return PhaseTimes(
            draft=float(phases.draft[0]), verify=float(phases.verify[0]), commit=float(phases.overhead[0])
        )

    def _outputs(self, step: ScheduledStep, gain: CommittedStep) -> tuple[RequestOutput, ...]:
        spans = list(zip(*(a.tolist() for a in (step.tickets, step.responses, step.emitted, gain.kept)), strict=True))
        spans += [(ticket, response, 0, 1) for _, ticket, response in step.prompts.T.tolist()]
        outputs = []
        for ticket, response, begin, count in spans:
            recorded, name = self.trace.responses[response], self._names[ticket]
            reason = recorded.finish_reason if ticket in gain.ended else None
            outputs.append(RequestOutput(name, recorded.tokens[begin : begin + count], finish_reason=reason))
            if reason:
                del self._tickets[name], self._names[ticket]
        return tuple(outputs)


def _select(controller: Controller, forest: Forest | None, plan: SpecPlan, batch: int, max_nodes: int) -> Selection:
    if forest is None:
        empty = torch.zeros(0, dtype=torch.int64)
        return Selection(empty.new_zeros(batch), empty, empty, empty)
    selection = controller.select(forest, plan)
    if selection.size > plan.budget or int(selection.counts.max()) > max_nodes:
        raise PlanViolation(f"controller '{controller.name}' selected {selection.size} nodes of {plan.budget} allowed")
    return selection
