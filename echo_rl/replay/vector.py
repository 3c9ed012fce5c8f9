"""Many replayed servers side by side: the coded action in, tokens and seconds out. Knows no SB3 and no reward.

Every lane has its own requests and arrivals; costs and statistics are computed for all lanes at
once. One `step` is one serving step of every lane.
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
from echo_rl.replay.scheduler import ReplayScheduler, ReplaySchedulerOptions, Turn, sums
from echo_rl.replay.timing import Phases, Plain, Work, noise, plain_step, step_phases
from echo_rl.replay.trace import Trace
from echo_rl.replay.vector_step import Orders, Tables, VectorVerdict
from echo_rl.workloads.arrivals import Arrivals, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Plans = tuple[tuple[int, tuple[float, int, int]], ...]
"""(largest batch, (nodes a request, depth, width)), by rising batch; the last one serves all larger batches too."""
IDLE_STEPS = 10_000
"""Steps without a decoding request after which a workload counts as broken."""


@dataclass(frozen=True)
class VectorReplayStep:
    """One serving step of every lane, [E] each."""

    outcomes: BatchedStepReport
    tokens: Floats  # got by requests, first tokens included
    decoded: Floats  # of them those of decoding requests
    seconds: Floats
    plain: Plain
    kept: Ints  # [R] tokens of each decoding request, lane by lane
    reference: Reference | None  # what the fleet's reference plan would have brought instead

    def within(self, tpot: float) -> Floats:
        """[E] share of the decoding requests that took at most so many seconds a token."""
        counts = self.outcomes.loads.batch.astype(np.int64)
        good = np.repeat(self.seconds, counts) / np.maximum(self.kept, 1e-9) <= tpot
        lanes = np.repeat(np.arange(len(counts)), counts)
        return sums(lanes, good, len(counts)) / counts


@dataclass(frozen=True)
class Reference:
    """The counterfactual of a step under one fixed plan, [E] each: same requests, same forests, no noise."""

    decoded: Floats
    seconds: Floats


class VectorReplay:
    """E lanes over one trace. `reset` a lane before its first step; `loads` is what the next step decides on."""

    def __init__(
        self,
        trace: Trace,
        costs: BatchedCostProfile,
        widths: Sequence[int],
        gates: Gates,
        score_power: Sequence[float],
        lanes: int,
        limits: ReplaySchedulerOptions | None = None,
        noisy: bool = True,
        reference: Plans = (),
    ) -> None:
        """`reference` are plans whose outcome every step tells too; none by default."""
        self._costs, self._gates, self._noisy, self._reference = costs, gates, noisy, reference
        self._limits = limits or ReplaySchedulerOptions()
        self._tables = Tables([trace.restricted(width) for width in widths], score_power)
        self._thresholds: dict[tuple[int, float, float], NDArray[np.float32]] = {}  # see `_gate_row`
        self._suites = {"": np.arange(len(trace.responses))} | {
            suite: np.array([i for i, r in enumerate(trace.responses) if r.suite == suite]) for suite in trace.suites
        }
        self.lanes, self._servers = lanes, ReplayScheduler(trace, self._limits, lanes)
        self._arrivals: list[Arrivals | None] = [None] * lanes
        self._generators = [np.random.default_rng(0) for _ in range(lanes)]
        self.now = np.zeros(lanes)
        self._turn = self._servers.turn()

    def reset(self, lane: int, workload: Workload, seed: int) -> None:
        """Empty a lane and serve this workload from time 0, up to its first step with a decoding request."""
        self._servers.clear(lane)
        self._generators[lane] = np.random.default_rng(seed)
        self._arrivals[lane] = Arrivals(workload, seed)
        self.now[lane] = 0.0
        self._advance([lane])

    def loads(self) -> BatchedLoadView:
        """[E] what the coming step is decided on."""
        return self._turn.loads

    def step(self, knobs: Knobs) -> VectorReplayStep:
        """Serve one step in every lane and move on to the next step with a decoding request."""
        turn, loads = self._turn, self._turn.loads
        budgets = np.minimum(knobs.budget(turn.counts), turn.counts * self._limits.max_nodes)
        on = budgets > 0
        verdicts, work = self._decide(turn, knobs, budgets, turn.unseen)
        reference = self._counterfactual(turn) if self._reference else None
        phases = self._times(work)
        plain = plain_step(self._costs, loads.batch, loads.context, loads.prefill)
        self.now += phases.total
        kept = self._servers.commit(turn, verdicts.accepted, on).kept
        decoded = sums(turn.servers, kept, self.lanes)
        outcomes = BatchedStepReport(
            loads=loads,
            budget=budgets.astype(np.float64),
            depth=np.where(on, knobs.depth, 0).astype(np.float64),
            width=np.where(on, knobs.width, 0).astype(np.float64),
            verified=verdicts.verified,
            committed=sums(turn.servers, verdicts.accepted, self.lanes) + turn.counts,
            reached=verdicts.reached,
            accepted=verdicts.hits,
            confidence=np.where(on[:, None], _confidence(turn, verdicts.first), np.nan),
            verify_seconds=phases.verify,
            draft_seconds=phases.draft,
            other_seconds=phases.overhead,
        )
        self._advance(range(self.lanes))
        tokens = decoded + np.bincount(turn.prompts[0], minlength=self.lanes)
        return VectorReplayStep(outcomes, tokens, decoded, phases.total, plain, kept, reference)

    def _decide(self, turn: Turn, knobs: Knobs, budgets: Ints, unseen: Floats) -> tuple[VectorVerdict, Work]:
        """What these knobs bring on the forests of the coming step, and what the step does for it."""
        depth = np.where(budgets > 0, knobs.depth, 0)
        rows = zip(depth.tolist(), knobs.gate.tolist(), knobs.floor.tolist(), strict=True)
        gates = np.stack([self._gate_row(*row) for row in rows])
        orders = Orders(budgets, depth, knobs.width, gates, knobs.floor)
        verdicts = self._tables.decide(turn.positions, turn.counts, orders, self._limits.max_nodes)
        work = Work(
            batch=turn.loads.batch,
            context=turn.loads.context,
            prefill=turn.loads.prefill,
            verified=verdicts.verified,
            width=knobs.width.astype(np.float64),
            drafting=verdicts.drafting,
            unseen=unseen,
            asked=((gates > NO_GATE) & (verdicts.drafting > 0)).sum(1).astype(np.float64),
        )
        return verdicts, work

    def _gate_row(self, depth: int, gate: float, floor: float) -> NDArray[np.float32]:
        """[DEPTHS] a plan's thresholds by depth, `NO_GATE` where it has none."""
        key = (depth, gate, floor)
        if key not in self._thresholds:
            gates = dict(planned_gates(self._gates, *key))
            self._thresholds[key] = np.array([gates.get(d, NO_GATE) for d in range(DEPTHS)], dtype=np.float32)
        return self._thresholds[key]

    def _counterfactual(self, turn: Turn) -> Reference:
        """The coming step under the reference plan, with nothing for the drafter to catch up on.

        What there is to catch up on is the policy's doing; it must not be able to make the reference look bad.
        """
        sizes, plans = zip(*self._reference, strict=True)
        place = np.minimum(np.searchsorted(sizes, turn.counts), len(sizes) - 1)
        nodes, depth, width = (np.array(values)[place] for values in zip(*plans, strict=True))
        none = np.zeros(self.lanes)
        knobs = Knobs(nodes, depth, width, none + CALIBRATED, none)
        verdicts, work = self._decide(turn, knobs, knobs.budget(turn.counts), unseen=none)
        decoded = sums(turn.servers, np.minimum(verdicts.accepted + 1, turn.room), self.lanes)
        return Reference(decoded, step_phases(self._costs, work).total)

    def _times(self, work: Work) -> Phases:
        phases = step_phases(self._costs, work)
        return phases.times(noise(self._generators, self._costs.scalar("noise"))) if self._noisy else phases

    def _advance(self, lanes: Sequence[int]) -> None:
        """Take arrivals and serve prompts alone in these lanes until in each some request decodes."""
        for _ in range(IDLE_STEPS):
            for lane in lanes:
                self._take_arrivals(lane)
            self._turn = self._servers.turn()
            decoding = self._turn.counts.tolist()
            lanes = [lane for lane in lanes if not decoding[lane]]
            if not lanes:
                return
            reading = np.zeros(self.lanes, dtype=bool)
            for lane in lanes:
                reading[lane] = self._servers.in_flight(lane) > 0
                self._pass_time(lane)
            self._servers.read(reading)
        raise ConfigError("no request decodes; the workload brings too few, give it higher rates")

    def _take_arrivals(self, lane: int) -> None:
        arrivals = self._arrivals[lane]
        assert arrivals is not None, "reset the lane first"
        for suite in arrivals.due(float(self.now[lane]), self._servers.in_flight(lane)):
            self._servers.add(int(self._generators[lane].choice(self._suites[suite])), lane)

    def _pass_time(self, lane: int) -> None:
        """A step without a decoding request, or where there is none at all the wait for one."""
        if self._servers.in_flight(lane):
            machine = self._costs.machine(lane)
            rows = machine.prefill_weight * int(self._turn.loads.prefill[lane])
            self.now[lane] += machine.verify_seconds(1, rows) + machine.step_overhead
            return
        arrivals, now = self._arrivals[lane], float(self.now[lane])
        assert arrivals is not None, "reset the lane first"
        upcoming = arrivals.next_time(now)
        assert upcoming is not None, "a workload must go on"
        self.now[lane] = max(now, upcoming)


def _confidence(turn: Turn, first: NDArray[np.float32]) -> Floats:
    """[E, 3] the quantiles of first tokens' probabilities ([R]) that are observed."""
    rows = np.full((len(turn.counts), turn.counts.max()), np.nan, dtype=np.float32)
    rows[np.arange(rows.shape[1]) < turn.counts[:, None]] = first
    return quantiles(rows, turn.counts)
