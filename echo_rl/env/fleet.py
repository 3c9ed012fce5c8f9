"""Many replayed servers side by side: the coded action in, tokens and seconds out. Knows no SB3 and no reward.

Every lane has its own requests and arrivals; costs and statistics are computed for all lanes at
once. One `step` is one serving step of every lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec import CONFIDENCE, DEPTHS, Knobs, Loads, Outcomes, gates_asked, quantiles, scaled_gates
from echo_rl.contracts import LoadView
from echo_rl.costs import CostArrays, Scaling
from echo_rl.env.lane import Gain, Lane, LaneOptions, Turn
from echo_rl.env.timing import Phases, Plain, Work, noise, plain_step, step_phases
from echo_rl.env.trace import Trace
from echo_rl.env.verdicts import Table, Verdict
from echo_rl.env.workload import Arrivals, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Gates = tuple[tuple[int, float], ...]
Plans = tuple[tuple[int, tuple[float, int, int]], ...]
"""(largest batch, (nodes a request, depth, width)), by rising batch; the last one serves all larger batches too."""
IDLE_STEPS = 10_000
"""Steps without a decoding request after which a workload counts as broken."""


@dataclass(frozen=True)
class FleetStep:
    """One serving step of every lane, [E] each."""

    outcomes: Outcomes
    tokens: Floats  # got by requests, first tokens included
    decoded: Floats  # of them those of decoding requests
    seconds: Floats
    plain: Plain
    kept: tuple[Ints, ...]  # per lane: tokens of each decoding request
    reference: Reference | None  # what the fleet's reference plan would have brought instead


@dataclass(frozen=True)
class Reference:
    """The counterfactual of a step under one fixed plan, [E] each: same requests, same forests, no noise."""

    decoded: Floats
    seconds: Floats


class Fleet:
    """E lanes over one trace. `reset` a lane before its first step; `loads` is what the next step decides on."""

    def __init__(
        self,
        trace: Trace,
        costs: CostArrays,
        widths: Sequence[int],
        gates: Gates,
        score_power: Sequence[float],
        lanes: int,
        limits: LaneOptions | None = None,
        noisy: bool = True,
        reference: Plans = (),
    ) -> None:
        """`reference` are plans whose outcome every step tells too; none by default."""
        self._costs, self._gates, self._noisy, self._reference = costs, gates, noisy, reference
        self._limits = limits or LaneOptions()
        self._tables = {width: Table(trace.restricted(width), score_power) for width in widths}
        self._suites = {"": np.arange(len(trace.responses))} | {
            suite: np.array([i for i, r in enumerate(trace.responses) if r.suite == suite]) for suite in trace.suites
        }
        self._lanes = [Lane(trace, self._limits) for _ in range(lanes)]
        self._arrivals: list[Arrivals | None] = [None] * lanes
        self._generators = [np.random.default_rng(0) for _ in range(lanes)]
        self.now = np.zeros(lanes)
        self.scaling = Scaling(*np.ones((4, lanes)))
        self._turns: list[Turn] = [lane.turn() for lane in self._lanes]
        self._views: list[LoadView] = [lane.load(turn) for lane, turn in zip(self._lanes, self._turns, strict=True)]

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def reset(self, lane: int, workload: Workload, seed: int) -> None:
        """Empty a lane and serve this workload from time 0, up to its first step with a decoding request."""
        self._lanes[lane].clear()
        self._generators[lane] = np.random.default_rng(seed)
        self._arrivals[lane] = Arrivals(workload, seed)
        self.now[lane] = 0.0
        self._advance(lane)

    def loads(self) -> Loads:
        """[E] what the coming step is decided on."""
        rows = [(v.batch_size, v.prefill_tokens, v.waiting, v.mean_context, v.kv_used, v.arrived) for v in self._views]
        return Loads(*np.array(rows, dtype=np.float64).T)

    def step(self, knobs: Knobs) -> FleetStep:
        """Serve one step in every lane and move on to the next step with a decoding request."""
        loads = self.loads()
        batch = loads.batch.astype(np.int64)
        budgets = np.minimum(knobs.budget(batch), batch * self._limits.max_nodes)
        tally = _Tally(self.lanes)
        reference = self._counterfactual(loads, batch) if self._reference else None
        turns = list(self._turns)
        gains = [self._serve(lane, knobs, int(budgets[lane]), tally) for lane in range(self.lanes)]
        unseen = np.array([float(turn.unseen) for turn in turns])
        phases = self._times(tally.work(loads, knobs.width.astype(np.float64), unseen))
        plain = plain_step(self._costs, self.scaling, loads.batch, loads.context, loads.prefill)
        self.now += phases.total
        decoded = np.array([float(gain.kept.sum()) for gain in gains])
        tokens = decoded + np.array([float(len(turn.prompts)) for turn in turns])
        outcomes = Outcomes(
            loads=loads,
            budget=budgets.astype(np.float64),
            depth=np.where(budgets > 0, knobs.depth, 0).astype(np.float64),
            width=np.where(budgets > 0, knobs.width, 0).astype(np.float64),
            verified=tally.verified,
            committed=tally.committed,
            reached=tally.reached,
            accepted=tally.hits,
            confidence=tally.confidence,
            verify_seconds=phases.verify,
            draft_seconds=phases.draft,
        )
        for lane in range(self.lanes):
            self._advance(lane)
        return FleetStep(outcomes, tokens, decoded, phases.total, plain, tuple(gain.kept for gain in gains), reference)

    def _serve(self, lane: int, knobs: Knobs, budget: int, tally: _Tally) -> Gain:
        """Decide and commit one lane's step."""
        turn = self._turns[lane]
        accepted = np.zeros(len(turn.decoding), dtype=np.int64)
        if budget:
            depth, floor = int(knobs.depth[lane]), float(knobs.floor[lane])
            gates = scaled_gates(self._gates, depth, float(knobs.gate_scale[lane]), floor)
            table = self._tables[int(knobs.width[lane])]
            verdict = table.decide(turn.positions, budget, depth, gates, self._limits.max_nodes, floor)
            tally.take(lane, verdict, gates_asked(gates, depth, verdict.drafting))
            accepted = verdict.accepted
        tally.committed[lane] = accepted.sum() + len(accepted)
        return self._lanes[lane].commit(turn, accepted, budget > 0)

    def _counterfactual(self, loads: Loads, batch: Ints) -> Reference:
        """The coming step under the reference plan, with nothing for the drafter to catch up on.

        What there is to catch up on is the policy's doing; it must not be able to make the reference look bad.
        """
        plans = [next((p for most, p in self._reference if size <= most), self._reference[-1][1]) for size in batch]
        widths = np.array([float(width) for _, _, width in plans])
        tally, decoded = _Tally(self.lanes), np.zeros(self.lanes)
        for lane, (turn, server) in enumerate(zip(self._turns, self._lanes, strict=True)):
            nodes, depth, width = plans[lane]
            budget = max(1, round(nodes * int(batch[lane])))
            gates = scaled_gates(self._gates, depth, 1.0, 0.0)
            verdict = self._tables[width].decide(turn.positions, budget, depth, gates, self._limits.max_nodes)
            tally.take(lane, verdict, gates_asked(gates, depth, verdict.drafting))
            decoded[lane] = server.kept(turn, verdict.accepted).sum()
        work = tally.work(loads, widths, unseen=np.zeros(self.lanes))
        return Reference(decoded, step_phases(self._costs, self.scaling, work).total)

    def _times(self, work: Work) -> Phases:
        phases = step_phases(self._costs, self.scaling, work)
        if not self._noisy:
            return phases
        sigma = self._costs.profile.noise
        return phases.times(np.concatenate([noise(g, sigma, 1) for g in self._generators]))

    def _advance(self, lane: int) -> None:
        """Take arrivals and serve prompts alone until some request decodes."""
        server, arrivals, passed = self._lanes[lane], self._arrivals[lane], 0
        assert arrivals is not None, "reset the lane first"
        for _ in range(IDLE_STEPS):
            for suite in arrivals.due(float(self.now[lane]), server.in_flight):
                server.add(int(self._generators[lane].choice(self._suites[suite])))
            if server.in_flight:
                turn = server.turn()
                view = server.load(turn)
                if len(turn.decoding):
                    self._turns[lane], self._views[lane] = turn, replace(view, arrived=view.arrived + passed)
                    return
                passed += view.arrived
                server.commit(turn, np.zeros(0, dtype=np.int64), drafted=False)
                self.now[lane] += self._prompt_seconds(turn, lane)
                continue
            upcoming = arrivals.next_time(float(self.now[lane]))
            assert upcoming is not None, "a workload must go on"
            self.now[lane] = max(self.now[lane], upcoming)
        raise RuntimeError("no request decodes; the workload brings none")

    def _prompt_seconds(self, turn: Turn, lane: int) -> float:
        profile = self._costs.profile
        rows = profile.prefill_weight * turn.prefill
        return float(self.scaling.fixed[lane]) * profile.verify_seconds(1, rows) + profile.step_overhead


@dataclass
class _Tally:
    """Counts of one step over lanes, written lane by lane."""

    lanes: int

    def __post_init__(self) -> None:
        self.verified = np.zeros(self.lanes)
        self.committed = np.zeros(self.lanes)
        self.asked = np.zeros(self.lanes)
        self.drafting, self.reached, self.hits = np.zeros((3, self.lanes, DEPTHS))
        self.confidence = np.full((self.lanes, len(CONFIDENCE)), np.nan)

    def take(self, lane: int, verdict: Verdict, asked: int) -> None:
        depth = len(verdict.drafting)
        self.verified[lane], self.asked[lane] = verdict.verified, asked
        self.drafting[lane, :depth] = verdict.drafting
        self.reached[lane, :depth] = verdict.reached
        self.hits[lane, :depth] = verdict.hits
        self.confidence[lane] = quantiles(verdict.confidence)

    def work(self, loads: Loads, width: Floats, unseen: Floats) -> Work:
        """What the steps did, for their times."""
        return Work(
            batch=loads.batch,
            context=loads.context,
            prefill=loads.prefill,
            verified=self.verified,
            width=width,
            drafting=self.drafting,
            unseen=unseen,
            asked=self.asked,
        )
