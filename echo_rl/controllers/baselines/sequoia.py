"""Sizes Sequoia's fixed tree by what the machine charges for it at each batch size. Sees no drafter's scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from echo_rl.contracts import AUTOREGRESSIVE, Forest, LoadView, Selection, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.cost_aware import CostAwareOptions
from echo_rl.controllers.baselines.dynamic import Values
from echo_rl.controllers.baselines.fixed import Path, Static, StaticOptions
from echo_rl.controllers.tree_shapes import REFERENCE_HIT, likeliest_tree
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile, context_of, half_octave
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class SequoiaOptions(CostAwareOptions):
    hit: float = REFERENCE_HIT
    """p of the positional model: a node's r-th child is accepted with probability ``p * (1 - p)**r``."""
    TUNABLE: ClassVar[Values] = {"hit": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "top_k": (4, 8)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.hit < 1.0:
            raise ConfigError(f"sequoia hit is {self.hit}; give a probability between 0 and 1")


@dataclass(frozen=True)
class _Trees:
    """The best tree of each size for one depth: the first n `paths`."""

    paths: tuple[Path, ...]
    gain: tuple[float, ...]  # expected accepted nodes of the first n = 1, 2, ... paths
    width: tuple[int, ...]  # that drafting them takes
    depth: tuple[int, ...]


class Sequoia(BaseController):
    """Sequoia (arXiv 2402.12374): the fixed tree with the best G(n, d) / (t(n) + d * c) for the batch size.

    G(n, d) is the expected yield of the best tree of n nodes and d levels under positional acceptance.
    There a node is no likelier than its parent or its elder sibling, so the paper's dynamic program and
    taking the likeliest paths one by one find the same trees; every prefix is the optimum of its size. At
    most `top_k` nodes a level have children. Size 0 is among the choices: plain decoding where no tree pays.
    """

    name = "sequoia"

    def __init__(self, options: SequoiaOptions) -> None:
        super().__init__(options)
        self._arrays = BatchedCostProfile(CostProfile.of(options.profile))
        self.materials = (self._arrays.profile,)
        self._grown = [_grow(options, depth) for depth in range(1, options.depth + 1)]
        self._known: dict[tuple[int, int, int], Static | None] = {}
        self._tree: Static | None = None

    def propose(self, load: LoadView) -> SpecPlan:
        key = (load.batch_size, half_octave(load.mean_context), min(load.max_nodes, self.options.total))
        if key not in self._known:
            paths = self._optimum(*key)
            self._known[key] = Static(StaticOptions(paths)) if paths else None
        self._tree = self._known[key]
        return self._tree.propose(load) if self._tree else AUTOREGRESSIVE

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        assert self._tree is not None, "select follows a plan that speculates"
        return self._tree.select(forest, plan)

    def _optimum(self, batch: int, halves: int, most: int) -> tuple[Path, ...]:
        """The paths of the fastest tree of at most `most` nodes a request; none where plain decoding is faster."""
        arrays, context = self._arrays, context_of(halves)
        best, paths = batch / arrays.profile.step_seconds(batch, 0, 0, 0, context), tuple[Path, ...]()
        for trees in self._grown:
            sizes = np.arange(1, min(most, len(trees.paths)) + 1)
            seconds = arrays.verify(batch, batch * (1 + sizes), context) + arrays.overhead(batch, batch * sizes, True)
            seconds += arrays.draft(batch, trees.width[: len(sizes)], trees.depth[: len(sizes)])
            rates = batch * (1.0 + np.asarray(trees.gain[: len(sizes)])) / seconds
            top = int(rates.argmax())
            if rates[top] > best:
                best, paths = float(rates[top]), trees.paths[: top + 1]
        return paths


def _grow(options: SequoiaOptions, depth: int) -> _Trees:
    """The likeliest paths within `top_k` children a node and `top_k` parents a level."""
    parents: list[set[Path]] = [set() for _ in range(depth)]
    paths: dict[Path, None] = {}  # in order
    gain, width, deepest = [0.0], [1], [0]
    for path in likeliest_tree(8 * options.total, depth, options.hit):
        family = parents[len(path) - 1]
        if path[-1] >= options.top_k or (path[:-1] not in family and len(family) >= options.top_k):
            continue
        if len(path) > 1 and path[:-1] not in paths:
            continue
        family.add(path[:-1])
        paths[path] = None
        gain.append(gain[-1] + math.prod(options.hit * (1.0 - options.hit) ** rank for rank in path))
        width.append(max(width[-1], path[-1] + 1, len(family)))
        deepest.append(max(deepest[-1], len(path)))
        if len(paths) == options.total:
            break
    return _Trees(tuple(paths), tuple(gain[1:]), tuple(width[1:]), tuple(deepest[1:]))
