"""Many replayed servers side by side: the coded action in, tokens and seconds out. Knows no environment and no reward.

Every server has its own requests and arrivals; costs and statistics are computed for all servers at
once. One `step` is one serving step of every server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec import CALIBRATED, DEPTHS, Knobs, planned_gates, quantiles
from echo_rl.contracts import NO_GATE, Gates
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.batched_records import BatchedLoadView, BatchedStepReport
from echo_rl.errors import ConfigError
from echo_rl.replay.scheduler import ReplayScheduler, ReplaySchedulerOptions, ScheduledStep, sums
from echo_rl.replay.timing import Phases, Plain, Work, noise, plain_step, step_phases
from echo_rl.replay.trace import Trace
from echo_rl.replay.vector_step import BatchedPlan, ForestTables, VectorVerdict
from echo_rl.workloads.arrivals import Arrivals, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Plans = tuple[tuple[int, tuple[float, int, int]], ...]
"""(largest batch, (nodes a request, depth, width)), by rising batch; the last one serves all larger batches too."""
IDLE_STEPS = 10_000
"""Steps without a decoding request after which a workload counts as broken."""


@dataclass(frozen=True)
class VectorReplayStep:
    """One serving step of every server, [E] each."""

    outcomes: BatchedStepReport
    tokens: Floats  # got by requests, first tokens included
    decoded: Floats  # of them those of decoding requests
    seconds: Floats
    plain: Plain
    kept: Ints  # [R] tokens of each decoding request, server by server
    reference: Reference | None  # what the reference plan would have brought instead

    def within(self, tpot: float) -> Floats:
        """[E] share of the decoding requests that took at most so many seconds a token."""
        counts = self.outcomes.loads.batch.astype(np.int64)
        good = np.repeat(self.seconds, counts) / np.maximum(self.kept, 1e-9) <= tpot
        servers = np.repeat(np.arange(len(counts)), counts)
        return sums(servers, good, len(counts)) / counts


@dataclass(frozen=True)
class Reference:
    """The counterfactual of a step under one fixed plan, [E] each: same requests, same forests, no noise."""

    decoded: Floats
    seconds: Floats


class VectorReplay:
    """E servers over one trace. `reset` a server before its first step; `loads` is what the next step decides on."""

    def __init__(
        self,
        trace: Trace,
        costs: BatchedCostProfile,
        widths: Sequence[int],
        gates: Gates,
        score_power: Sequence[float],
        count: int,
        limits: ReplaySchedulerOptions | None = None,
        noisy: bool = True,
        reference: Plans = (),
    ) -> None:
        """`reference` are plans whose outcome every step tells too; none by default."""
        self._costs, self._gates, self._noisy, self._reference = costs, gates, noisy, reference
        self._limits = limits or ReplaySchedulerOptions()
        self._tables = ForestTables([trace.restricted(width) for width in widths], score_power)
        self._thresholds: dict[tuple[int, float, float], NDArray[np.float32]] = {}  # see `_gate_row`
        self._suites = {"": np.arange(len(trace.responses))} | {
            suite: np.array([i for i, r in enumerate(trace.responses) if r.suite == suite]) for suite in trace.suites
        }
        self.count, self._scheduler = count, ReplayScheduler(trace, self._limits, count)
        self._arrivals: dict[int, Arrivals] = {}  # by server, of those that were reset
        self._generators = [np.random.default_rng(0) for _ in range(count)]
        self.now = np.zeros(count)
        self._scheduled = self._scheduler.schedule()

    def reset(self, server: int, workload: Workload, seed: int) -> None:
        """Empty a server and serve this workload from time 0, up to its first step with a decoding request."""
        self._scheduler.clear(server)
        self._generators[server] = np.random.default_rng(seed)
        self._arrivals[server] = Arrivals(workload, seed)
        self.now[server] = 0.0
        self._advance([server])

    def loads(self) -> BatchedLoadView:
        """[E] what the coming step is decided on."""
        return self._scheduled.loads

    def step(self, knobs: Knobs) -> VectorReplayStep:
        """Serve one step in every server and move on to the next step with a decoding request."""
        step, loads = self._scheduled, self._scheduled.loads
        budgets = np.minimum(knobs.budget(step.counts), step.counts * self._limits.max_nodes)
        on = budgets > 0
        verdict, work = self._decide(step, knobs, budgets, step.unseen)
        reference = self._counterfactual(step) if self._reference else None
        phases = self._times(work)
        plain = plain_step(self._costs, loads.batch, loads.context, loads.prefill)
        self.now += phases.total
        kept = self._scheduler.commit(step, verdict.accepted, on).kept
        decoded = sums(step.servers, kept, self.count)
        outcomes = BatchedStepReport(
            loads=loads,
            budget=budgets.astype(np.float64),
            depth=np.where(on, knobs.depth, 0).astype(np.float64),
            width=np.where(on, knobs.width, 0).astype(np.float64),
            verified=verdict.verified,
            committed=sums(step.servers, verdict.accepted, self.count) + step.counts,
            reached=verdict.reached,
            accepted=verdict.hits,
            confidence=np.where(on[:, None], _confidence(step, verdict.first), np.nan),
            verify_seconds=phases.verify,
            draft_seconds=phases.draft,
            other_seconds=phases.overhead,
        )
        self._advance(range(self.count))
        tokens = decoded + np.bincount(step.prompts[0], minlength=self.count)
        return VectorReplayStep(outcomes, tokens, decoded, phases.total, plain, kept, reference)

    def _decide(self, step: ScheduledStep, knobs: Knobs, budgets: Ints, unseen: Floats) -> tuple[VectorVerdict, Work]:
        """The verdict of these knobs on the forests of the coming step, and the work that the step does for it."""
        depth = np.where(budgets > 0, knobs.depth, 0)
        rows = zip(depth.tolist(), knobs.gate.tolist(), knobs.floor.tolist(), strict=True)
        gates = np.stack([self._gate_row(*row) for row in rows])
        plan = BatchedPlan(budgets, depth, knobs.width, gates, knobs.floor)
        verdict = self._tables.decide(step.positions, step.counts, plan, self._limits.max_nodes)
        work = Work(
            batch=step.loads.batch,
            context=step.loads.context,
            prefill=step.loads.prefill,
            verified=verdict.verified,
            width=knobs.width.astype(np.float64),
            drafting=verdict.drafting,
            unseen=unseen,
            asked=((gates > NO_GATE) & (verdict.drafting > 0)).sum(1).astype(np.float64),
        )
        return verdict, work

    def _gate_row(self, depth: int, gate: float, floor: float) -> NDArray[np.float32]:
        """[DEPTHS] a plan's thresholds by depth, `NO_GATE` where it has none."""
        key = (depth, gate, floor)
        if key not in self._thresholds:
            gates = dict(planned_gates(self._gates, *key))
            self._thresholds[key] = np.array([gates.get(d, NO_GATE) for d in range(DEPTHS)], dtype=np.float32)
        return self._thresholds[key]

    def _counterfactual(self, step: ScheduledStep) -> Reference:
        """The coming step under the reference plan, with nothing for the drafter to catch up on.

        What there is to catch up on is the policy's doing; it must not be able to make the reference look bad.
        """
        sizes, plans = zip(*self._reference, strict=True)
        place = np.minimum(np.searchsorted(sizes, step.counts), len(sizes) - 1)
        nodes, depth, width = (np.array(values)[place] for values in zip(*plans, strict=True))
        none = np.zeros(self.count)
        knobs = Knobs(nodes, depth, width, none + CALIBRATED, none)
        verdict, work = self._decide(step, knobs, knobs.budget(step.counts), unseen=none)
        decoded = sums(step.servers, np.minimum(verdict.accepted + 1, step.room), self.count)
        return Reference(decoded, step_phases(self._costs, work).total)

    def _times(self, work: Work) -> Phases:
        phases = step_phases(self._costs, work)
        return phases.times(noise(self._generators, self._costs.scalar("noise"))) if self._noisy else phases

    def _advance(self, servers: Sequence[int]) -> None:
        """Take arrivals and serve prompts alone in these servers until in each some request decodes."""
        for _ in range(IDLE_STEPS):
            for server in servers:
                for suite in self._arrivals[server].due(float(self.now[server]), self._scheduler.in_flight(server)):
                    self._scheduler.add(int(self._generators[server].choice(self._suites[suite])), server)
            self._scheduled = self._scheduler.schedule()
            decoding = self._scheduled.counts.tolist()
            servers = [server for server in servers if not decoding[server]]
            if not servers:
                return
            reading = np.zeros(self.count, dtype=bool)
            for server in servers:
                reading[server] = self._scheduler.in_flight(server) > 0
                self._pass_time(server)
            self._scheduler.prefill(reading)
        raise ConfigError("no request decodes; the workload brings too few, give it higher rates")

    def _pass_time(self, server: int) -> None:
        """A step without a decoding request, or where there is none at all the wait for one."""
        if self._scheduler.in_flight(server):
            machine = self._costs.machine(server)
            rows = machine.prefill_weight * int(self._scheduled.loads.prefill[server])
            self.now[server] += machine.verify_seconds(1, rows) + machine.step_overhead
            return
        upcoming = self._arrivals[server].next_time(float(self.now[server]))
        assert upcoming is not None, "a workload must go on"
        self.now[server] = max(self.now[server], upcoming)


def _confidence(step: ScheduledStep, first: NDArray[np.float32]) -> Floats:
    """[E, 3] the quantiles of first tokens' probabilities ([R]) that are observed."""
    rows = np.full((len(step.counts), step.counts.max()), np.nan, dtype=np.float32)
    rows[np.arange(rows.shape[1]) < step.counts[:, None]] = first
    return quantiles(rows, step.counts)
