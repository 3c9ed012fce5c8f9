"""Corrects cost profiles as `CostCorrector` does, for many servers at once (lanes, [E] arrays)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.batched_records import BatchedStepReport
from echo_rl.costs.correction import FORGOTTEN, NOISE, OCTAVES, OUTLIER, PRIOR, RATE, STEP, basis

Floats = NDArray[np.float64]
Lanes = NDArray[np.bool_]


class BatchedCorrectionCurve:
    """The `CorrectionCurve` of each lane."""

    def __init__(self, lanes: int) -> None:
        self._logs = np.zeros((lanes, OCTAVES))
        self._covariance = np.tile(PRIOR, (lanes, 1, 1))

    def reset(self, lanes: Lanes) -> None:
        """Forget everything about these lanes ([E] bool)."""
        self._logs[lanes], self._covariance[lanes] = 0.0, PRIOR

    def factors(self, rows: Floats) -> Floats:
        """[E, ...] rows -> measured over predicted seconds of such passes."""
        factors: Floats = np.exp(np.einsum("e...k,ek->e...", basis(rows), self._logs))
        return factors

    def follow(self, rows: Floats, ratio: Floats, counts: Lanes) -> None:
        """Learn, in the lanes that count, from passes of `rows` that took `ratio` of their prediction, [E] each."""
        counts = counts & (ratio > 0.0) & np.isfinite(ratio)
        if not counts.any():
            return
        seen, known = basis(rows[counts]), self._covariance[counts]
        known = known + FORGOTTEN * (PRIOR - known)
        gain = np.einsum("ejk,ek->ej", known, seen)
        spread = (gain * seen).sum(1) + NOISE**2
        most = OUTLIER * np.sqrt(spread)
        surprise = np.log(ratio[counts]) - (self._logs[counts] * seen).sum(1)
        self._logs[counts] += gain * (np.clip(surprise, -most, most) / spread)[:, None]
        self._covariance[counts] = known - gain[:, :, None] * (gain / spread[:, None])[:, None, :]


class BatchedCostCorrector:
    """The `CostCorrector` of each lane; no request of theirs refuses speculation."""

    def __init__(self, costs: BatchedCostProfile, lanes: int) -> None:
        self._costs, self._lanes = costs, np.arange(lanes)
        self._behind = np.zeros(lanes, dtype=bool)
        self.verify = BatchedCorrectionCurve(lanes)
        self.draft = np.ones(lanes)
        self.rest = np.ones((lanes, 2))
        """[E, 2] measured over predicted seconds outside the passes, of plain and of speculative steps."""

    def reset(self, lanes: Lanes) -> None:
        """Forget everything about these lanes ([E] bool)."""
        self.verify.reset(lanes)
        self._behind[lanes], self.draft[lanes], self.rest[lanes] = False, 1.0, 1.0

    def observe(self, outcomes: BatchedStepReport) -> None:
        loads, costs, verified = outcomes.loads, self._costs, outcomes.verified
        speculates, batch = outcomes.budget > 0, np.maximum(loads.batch, 1.0)
        counts = (loads.batch > 0) & (loads.prefill == 0)
        behind, self._behind = self._behind, ~speculates | (loads.prefill > 0)
        rows = batch + verified
        self.verify.follow(rows, outcomes.verify_seconds / costs.verify(batch, rows, loads.context), counts)
        usual = costs.overhead(batch, verified, speculates)
        kind = (self._lanes, speculates.astype(np.int64))
        rest = outcomes.other_seconds / np.where(usual > 0.0, usual, np.inf)
        self.rest[kind] = _follow(self.rest[kind], rest, counts)
        drafted = np.where(speculates, costs.draft(batch, np.maximum(outcomes.width, 1.0), outcomes.depth), np.inf)
        self.draft = _follow(self.draft, outcomes.draft_seconds / drafted, counts & speculates & ~behind)


def _follow(averages: Floats, ratios: Floats, counts: Lanes) -> Floats:
    """`correction._follow` in the lanes that count."""
    counts = counts & (ratios > 0.0)
    surprise = np.log(np.where(counts, ratios / averages, 1.0))
    return averages * np.exp(RATE * np.clip(surprise, -STEP, STEP))
