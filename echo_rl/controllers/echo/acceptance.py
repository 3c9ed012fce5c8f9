"""Estimates what a budget yields: accepted nodes a request as a function of the tree's size and depth.

One scalar, the drafter's *skill* (how often its first choice is right), is fitted to everything
observed lately, and the yield at each depth is then corrected by what that depth really gave. So a
budget that was never tried still has an estimate, and one in use has a measured one. Knows nothing of time.

Shapes: S skills on a grid, O tree sizes to compare, D = MAX_DEPTH levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from echo_rl.contracts import StepReport
from echo_rl.controllers.tree_shapes import MAX_DEPTH, REFERENCE_HIT, pooled_yield, separate_yield

Floats = NDArray[np.float64]

SKILLS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
PRIOR_REQUESTS = 48.0
"""Weight of the prior (skill 0.6, no correction), in observed requests."""


class AcceptanceModel:
    """E[L] as a function of nodes a request, depth and width, learned from `StepReport`s.

    Counts decay with a memory of `horizon` requests; depths that a step did not draft keep theirs, so
    what was learned before speculation was switched off is still there when it is reconsidered.
    """

    def __init__(self, horizon: float = 256.0, pooled: bool = True) -> None:
        self._horizon, self._pooled = horizon, pooled
        prior = reference_yield(3.0, MAX_DEPTH, 3, pooled)  # [S, D]
        self._expected = prior * PRIOR_REQUESTS  # [S, D] what each skill would have had accepted
        self._accepted = self._expected[SKILLS.index(REFERENCE_HIT)].copy()  # [D] what was

    def yields(self, options: Sequence[tuple[float, int, int]], batch: int) -> Floats:
        """[S, O, D] reference yields of trees of (nodes a request, depth, width), to be passed to `expected`.

        A batch of one cannot move budget between requests and a large one can: the pooled yield
        weighs ``1 - 1 / batch``.
        """
        share = 1.0 - 1.0 / batch if self._pooled else 0.0
        return np.stack([mixed_yield(nodes, depth, width, share) for nodes, depth, width in options], axis=1)

    def expected(self, yields: Floats, miss: float = 1.0) -> Floats:
        """[O] E[L]: accepted nodes a request. `miss` < 1 asks what a drafter with fewer misses would yield."""
        low, share = self._skill(miss)
        levels = yields[low] + share * (yields[low + 1] - yields[low])
        if miss == 1.0:
            fitted = self._expected[low] + share * (self._expected[low + 1] - self._expected[low])
            levels = levels * ((self._accepted + PRIOR_REQUESTS / 8) / (fitted + PRIOR_REQUESTS / 8))
        total: Floats = np.minimum.accumulate(np.minimum(levels, 1.0), axis=1).sum(1)
        return total

    def observe(self, report: StepReport) -> None:
        batch, depth = report.load.batch_size, min(report.plan.max_depth, MAX_DEPTH)
        if not report.verified or not batch:
            return
        nodes = round(4.0 * report.verified / batch) / 4.0 or 0.25
        decay = math.exp(-batch / self._horizon)
        expected, accepted = self._expected[:, :depth], self._accepted[:depth]
        expected *= decay
        share = 1.0 - 1.0 / batch if self._pooled else 0.0
        expected += mixed_yield(nodes, depth, report.plan.width, share)[:, :depth] * batch
        counts = report.accepted_by_depth[:depth]
        accepted *= decay
        accepted[: len(counts)] += counts

    def _skill(self, miss: float) -> tuple[int, float]:
        """The skill whose expected total is what was accepted, as (grid index, share of the next)."""
        totals, total = self._expected.sum(1).tolist(), float(self._accepted.sum())
        low = max((i for i in range(len(SKILLS) - 1) if totals[i] <= total), default=0)
        share = min(1.0, max(0.0, (total - totals[low]) / (totals[low + 1] - totals[low])))
        if miss == 1.0:
            return low, share
        skill = 1.0 - miss * (1.0 - SKILLS[low] - share * (SKILLS[low + 1] - SKILLS[low]))
        low = max(i for i in range(len(SKILLS) - 1) if SKILLS[i] <= max(skill, SKILLS[0]))
        return low, min(1.0, (skill - SKILLS[low]) / (SKILLS[low + 1] - SKILLS[low]))


@lru_cache(maxsize=4096)
def reference_yield(nodes: float, depth: int, width: int, pooled: bool) -> Floats:
    """[S, D] accepted nodes a request by depth, for each skill. Read only."""
    rule = pooled_yield if pooled else separate_yield
    return _read_only(np.array([rule(nodes, depth, width, skill) for skill in SKILLS]))


@lru_cache(maxsize=16384)
def mixed_yield(nodes: float, depth: int, width: int, pooled: float) -> Floats:
    """[S, D] between the yields of equal shares (0) and of one budget for all (1). Read only."""
    apart = reference_yield(nodes, depth, width, False)
    if not pooled:
        return apart
    return _read_only(apart + pooled * (reference_yield(nodes, depth, width, True) - apart))


def _read_only(array: Floats) -> Floats:
    array.flags.writeable = False
    return array
