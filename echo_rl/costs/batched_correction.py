"""Corrects cost profiles as `CostCorrector` does, for many servers at once ([E] arrays)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.batched_records import BatchedStepReport
from echo_rl.costs.correction import FORGOTTEN, NOISE, OCTAVES, OUTLIER, PRIOR, RATE, STEP, basis

Floats = NDArray[np.float64]
Servers = NDArray[np.bool_]


class BatchedCorrectionCurve:
    """The `CorrectionCurve` of each server."""

    def __init__(self, servers: int) -> None:
        self._logs = np.zeros((servers, OCTAVES))
        self._covariance = np.tile(PRIOR, (servers, 1, 1))

    def reset(self, servers: Servers) -> None:
        """Forget everything about these servers ([E] bool)."""
        self._logs[servers], self._covariance[servers] = 0.0, PRIOR

    def factors(self, rows: Floats) -> Floats:
        """[E, ...] rows -> measured over predicted seconds of such passes."""
        factors: Floats = np.exp(np.einsum("e...k,ek->e...", basis(rows), self._logs))
        return factors

    def follow(self, rows: Floats, ratio: Floats, counts: Servers) -> None:
        """Learn, in the servers that count, from passes of `rows` that took `ratio` of their prediction, [E] each."""
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
    """The `CostCorrector` of each server; no request of theirs refuses speculation."""

    def __init__(self, costs: BatchedCostProfile, servers: int) -> None:
        self._costs, self._servers = costs, np.arange(servers)
        self._behind = np.zeros(servers, dtype=bool)
        self.verify = BatchedCorrectionCurve(servers)
        self.draft = np.ones(servers)
        self.rest = np.ones((servers, 2))
        """[E, 2] measured over predicted seconds outside the passes, of plain and of speculative steps."""

    def reset(self, servers: Servers) -> None:
        """Forget everything about these servers ([E] bool)."""
        self.verify.reset(servers)
        self._behind[servers], self.draft[servers], self.rest[servers] = False, 1.0, 1.0

    def observe(self, outcomes: BatchedStepReport) -> None:
        loads, costs, verified = outcomes.loads, self._costs, outcomes.verified
        speculates, batch = outcomes.budget > 0, np.maximum(loads.batch, 1.0)
        counts = (loads.batch > 0) & (loads.prefill == 0)
        behind, self._behind = self._behind, ~speculates | (loads.prefill > 0)
        rows = batch + verified
        self.verify.follow(rows, outcomes.verify_seconds / costs.verify(batch, rows, loads.context), counts)
        usual = costs.overhead(batch, verified, speculates)
        kind = (self._servers, speculates.astype(np.int64))
        rest = outcomes.other_seconds / np.where(usual > 0.0, usual, np.inf)
        self.rest[kind] = _follow(self.rest[kind], rest, counts)
        drafted = np.where(speculates, costs.draft(batch, np.maximum(outcomes.width, 1.0), outcomes.depth), np.inf)
        self.draft = _follow(self.draft, outcomes.draft_seconds / drafted, counts & speculates & ~behind)


def _follow(averages: Floats, ratios: Floats, counts: Servers) -> Floats:
    """`correction._follow` in the servers that count."""
    counts = counts & (ratios > 0.0)
    surprise = np.log(np.where(counts, ratios / averages, 1.0))
    return averages * np.exp(RATE * np.clip(surprise, -STEP, STEP))
