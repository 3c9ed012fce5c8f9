"""Tracks how deep drafted chains are accepted, and makes the forest that a controller is shown for SGLang's.

SGLang's draft scores never leave the device. What a step reports is how many drafted tokens each request
had accepted, so the running chance of acceptance at every depth stands in for the drafter's confidence.

Shapes: B requests, D levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from echo_rl.contracts import Controller, Forest, Frontier, SpecPlan

PRIOR = 0.6
"""The chance of acceptance that an unseen depth starts from (the reference hit rate of `controllers.tree_shapes`)."""
PRIOR_REQUESTS = 8.0
"""The weight of the prior, in observed requests."""


class AcceptanceTracker:
    """Keeps a running chance of acceptance by depth, over about the last `horizon` requests that reached it."""

    def __init__(self, levels: int, horizon: float = 256.0) -> None:
        self._keep = math.exp(-1.0 / horizon)
        self._reached = [PRIOR_REQUESTS] * levels
        self._accepted = [PRIOR_REQUESTS * PRIOR] * levels

    @property
    def chances(self) -> tuple[float, ...]:
        """Index d holds the chance that depth d is accepted where depth d - 1 was."""
        return tuple(accepted / reached for accepted, reached in zip(self._accepted, self._reached, strict=True))

    def observe(self, reached: Sequence[int], accepted: Sequence[int]) -> None:
        """Adds a step's counts by depth, as in `StepReport`."""
        for depth, (tried, passed) in enumerate(zip(reached, accepted, strict=True)):
            if tried and depth < len(self._reached):
                keep = self._keep**tried
                self._reached[depth] = self._reached[depth] * keep + tried
                self._accepted[depth] = self._accepted[depth] * keep + passed

    def forest(self, batch: int, levels: int, stop: int | None = None) -> Forest:
        """Returns a chain of `levels` nodes a request, each scored by how often that depth was lately accepted."""
        chances = torch.tensor(self.chances[:levels], dtype=torch.float64).clamp(1e-6, 1.0)
        scores = chances.log().cumsum(0).float()  # [D]
        return Forest(
            tokens=torch.zeros(batch, levels, dtype=torch.int64),
            parents=torch.arange(-1, levels - 1).expand(batch, levels),
            depths=torch.arange(levels),
            scores=scores.expand(batch, levels).contiguous(),
            stop_depth=torch.full((batch,), levels - 1 if stop is None else stop),
        )


def chain_nodes(controller: Controller, plan: SpecPlan, acceptance: AcceptanceTracker, batch: int, levels: int) -> int:
    """Counts the nodes over the batch that the controller verifies of the tracked forest, after gates and selection.

    Drafts level by level as the engine does: at a gated depth `extend` may stop every request (all have
    the same scores), and `select` then picks among the levels drafted. Never more than the plan's budget.
    """
    forest = acceptance.forest(batch, levels)
    drafted, alive = levels, torch.ones(batch, dtype=torch.bool)
    for depth in range(levels - 1):
        if plan.gate(depth) is not None:
            alive = controller.extend(Frontier(depth, forest.scores[:, depth : depth + 1], alive), plan)
            if not bool(alive.any()):
                drafted = depth + 1
                break
    selection = controller.select(acceptance.forest(batch, drafted, drafted - 1), plan)
    return min(selection.size, plan.budget)
