"""Bounds replays from above: a selection that knows what the target will accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from echo_rl.contracts import AUTOREGRESSIVE, OFF_PATH, Forest, LoadView, Selection, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.selection import pack
from echo_rl.controllers.tree_shapes import MAX_DEPTH
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, PlanViolation


@dataclass(frozen=True)
class OracleOptions:
    depth: int = 4
    """Levels drafted in a step that speculates."""
    width: int = 3
    """Nodes expanded a level."""
    profile: CostProfile | str | None = None
    """The machine's costs, or their file; None takes this machine's own, else the packaged one."""

    TUNABLE: ClassVar[Mapping[str, tuple[int, ...]]] = {"depth": (1, 2, 3, 4, 6, 8), "width": (1, 2, 3, 6)}

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= MAX_DEPTH or self.width < 1:
            raise ConfigError(f"oracle depth {self.depth}, width {self.width}: give 1 to {MAX_DEPTH} and at least 1")


class Oracle(BaseController):
    """Verifies exactly the drafted nodes that will be accepted: no rule that drafts the same trees can do better.

    Clairvoyant, so it runs on replays alone, whose forests mark the nodes off the target's path
    (`OFF_PATH`). It does not know before drafting whether that will pay: it drafts wherever drafting costs less
    than the plain step that one accepted token a request would save.
    """

    name = "oracle"

    def __init__(self, options: OracleOptions) -> None:
        super().__init__(options)
        self._profile = CostProfile.of(options.profile)
        self.materials = (self._profile,)

    def propose(self, load: LoadView) -> SpecPlan:
        depth, width = self.options.depth, self.options.width
        plain = self._profile.step_seconds(load.batch_size, 0, 1, 0, load.mean_context)
        if self._profile.draft_seconds(load.batch_size, width, depth) >= plain:
            return AUTOREGRESSIVE
        return SpecPlan(load.batch_size * depth, depth, width)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """Raises `PlanViolation` on a live forest, which tells nothing of what the target will say."""
        on = forest.exists & (forest.tokens != OFF_PATH)
        levels = torch.zeros(forest.batch_size, MAX_DEPTH, dtype=torch.int64).index_add_(1, forest.depths, on.long())
        if bool((levels > 1).any()):  # a path has one node a level
            raise PlanViolation("the oracle needs a replay: a live forest doesn't say what will be accepted")
        return pack(forest, on & (forest.depths < (self._node_cap or MAX_DEPTH)))
