"""What a budget is expected to yield: accepted nodes a request as a function of the tree's size and depth.

One scalar, the drafter's *skill* (how often its first choice is right), is fitted to everything
observed lately, and the yield at each depth is then corrected by what that depth really gave. So a
budget that was never tried still has an estimate, and one in use has a measured one. Knows nothing of time.

Shapes: S skills on a grid, O tree sizes to compare, D = MAX_DEPTH levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from echo_rl.contracts import StepReport
from echo_rl.controllers.shapes import MAX_DEPTH, REFERENCE_HIT, pooled_yield, separate_yield

SKILLS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
PRIOR_REQUESTS = 48.0
"""Weight of the prior (skill 0.6, no correction), in observed requests."""


class AcceptanceModel:
    """E[L] as a function of nodes a request and depth, learned from `StepReport`s.

    Counts decay with a memory of `horizon` requests; depths that a step did not draft keep theirs, so
    what was learned before speculation was switched off is still there when it is reconsidered.
    """

    def __init__(self, horizon: float = 256.0, pooled: bool = True) -> None:
        self._horizon, self._pooled = horizon, pooled
        prior = reference_yield(3.0, MAX_DEPTH, pooled)  # [S, D]
        self._expected = prior * PRIOR_REQUESTS  # [S, D] what each skill would have had accepted
        self._accepted = self._expected[SKILLS.index(REFERENCE_HIT)].clone()  # [D] what was

    def yields(self, options: Sequence[tuple[float, int]], batch: int) -> Tensor:
        """[S, O, D] reference yields of trees of (nodes a request, depth), to be passed to `expected`.

        A batch of one cannot move budget between requests and a large one can: the pooled yield
        weighs ``1 - 1 / batch``.
        """
        share = 1.0 - 1.0 / batch if self._pooled else 0.0
        apart = torch.stack([reference_yield(nodes, depth, False) for nodes, depth in options], dim=1)
        if not share:
            return apart
        return apart.lerp(torch.stack([reference_yield(nodes, depth, True) for nodes, depth in options], dim=1), share)

    def expected(self, yields: Tensor, miss: float = 1.0) -> Tensor:
        """[O] E[L]: accepted nodes a request. `miss` < 1 asks what a drafter with fewer misses would yield."""
        low, share = self._skill(miss)
        fitted = torch.lerp(self._expected[low], self._expected[low + 1], share)
        correction = ((self._accepted + PRIOR_REQUESTS / 8) / (fitted + PRIOR_REQUESTS / 8)) if miss == 1.0 else 1.0
        levels = torch.lerp(yields[low], yields[low + 1], share) * correction
        return levels.clamp(max=1.0).cummin(1).values.sum(1)

    def observe(self, report: StepReport) -> None:
        batch, depth = report.load.batch_size, min(report.plan.max_depth, MAX_DEPTH)
        if not report.verified or not batch:
            return
        nodes = round(4.0 * report.verified / batch) / 4.0 or 0.25
        decay = math.exp(-batch / self._horizon)
        seen = self.yields(((nodes, depth),), batch)[:, 0, :depth]
        self._expected[:, :depth] = self._expected[:, :depth] * decay + seen * batch
        counts = (*report.accepted_by_depth[:depth], *[0] * (depth - len(report.accepted_by_depth)))
        self._accepted[:depth] = self._accepted[:depth] * decay + torch.tensor(counts, dtype=self._accepted.dtype)

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
def reference_yield(nodes: float, depth: int, pooled: bool) -> Tensor:
    """[S, D] accepted nodes a request by depth, for each skill. Do not write to it."""
    rule = pooled_yield if pooled else separate_yield
    return torch.tensor([rule(nodes, depth, skill) for skill in SKILLS], dtype=torch.float64)
