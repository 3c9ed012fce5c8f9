"""Holds controllers whose decision never changes: plain decoding, a chain, a fixed tree, EAGLE-3's tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Forest, LoadView, Selection, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.selection import pack, per_request_top_k
from echo_rl.controllers.tree_shapes import likeliest_tree
from echo_rl.errors import ConfigError

Path = tuple[int, ...]

EAGLE1_TREE: tuple[Path, ...] = likeliest_tree(nodes=25, depth=5)
"""A tree of the size and depth of EAGLE-1's default one: 25 nodes in 5 levels, placed by the rank model."""


@dataclass(frozen=True)
class NoneOptions:
    """Plain decoding has no knobs."""


class NoSpeculation(BaseController):
    """Plain autoregressive decoding: the baseline of every comparison."""

    name = "none"

    def propose(self, load: LoadView) -> SpecPlan:
        return AUTOREGRESSIVE


@dataclass(frozen=True)
class ChainOptions:
    steps: int = 3
    """Tokens drafted in a row (SGLang's EAGLE-3 serving default)."""

    TUNABLE: ClassVar[Mapping[str, tuple[int, ...]]] = {"steps": (1, 2, 3, 4, 5)}

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"chain steps is {self.steps}; give at least 1 (or use the controller 'none')")


class Chain(BaseController):
    """One path of `steps` tokens for every request."""

    name = "chain"
    options: ChainOptions

    def propose(self, load: LoadView) -> SpecPlan:
        steps = min(self.options.steps, load.max_nodes)
        return SpecPlan(budget=steps * load.batch_size, max_depth=steps, width=1)


@dataclass(frozen=True)
class FixedOptions:
    nodes: float = 7.0
    """Verified nodes a request, averaged over the batch; 0 is plain decoding."""
    depth: int = 4
    """Levels drafted."""
    width: int = 3
    """Nodes expanded a level, and children of each."""

    def __post_init__(self) -> None:
        if self.nodes < 0 or min(self.depth, self.width) < 1:
            raise ConfigError(
                f"fixed nodes {self.nodes}, depth {self.depth}, width {self.width}: give at least 0, 1 and 1"
            )


class Fixed(BaseController):
    """One plan for every step, whatever the load; the batch's likeliest nodes are verified."""

    name = "fixed"
    options: FixedOptions

    def propose(self, load: LoadView) -> SpecPlan:
        options = self.options
        return SpecPlan(round(options.nodes * load.batch_size), options.depth, options.width)


@dataclass(frozen=True)
class Eagle3Options:
    """EAGLE-3's defaults."""

    total: int = 60
    """Drafted nodes that a request may have verified (the authors' figure includes the root)."""
    depth: int = 8
    """Levels drafted."""
    top_k: int = 10
    """Nodes expanded a level, and children of each."""

    TUNABLE: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "total": (3, 7, 15, 30, 60), "depth": (3, 4, 6, 8), "top_k": (3, 8),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.total, self.depth, self.top_k) < 1:
            raise ConfigError(f"tree total {self.total}, depth {self.depth}, top_k {self.top_k}: give at least 1 each")


class Eagle3(BaseController):
    """EAGLE-3's dynamic tree (arXiv 2503.01840): expand `top_k` nodes a level, verify each request's best `total`.

    It considers one request at a time and is blind to the batch.
    """

    name = "eagle3"
    options: Eagle3Options

    def propose(self, load: LoadView) -> SpecPlan:
        options = self.options
        return SpecPlan(options.total * load.batch_size, options.depth, options.top_k)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        return pack(forest, per_request_top_k(forest, plan.budget // forest.batch_size))


@dataclass(frozen=True)
class StaticOptions:
    paths: tuple[Path, ...] = EAGLE1_TREE
    """Every node as the child ranks that lead to it: (0, 1) is the first child's second child."""

    def __post_init__(self) -> None:
        known = set(self.paths)
        if not known or len(known) != len(self.paths):
            raise ConfigError("static paths are empty or repeat a node")
        for path in self.paths:
            if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in known):
                raise ConfigError(f"static path {path} is empty, negative or lacks its parent {path[:-1]}")


class Static(BaseController):
    """A fixed topology (Medusa, arXiv 2401.10774; EAGLE-1, arXiv 2401.15077): the same child ranks in every step.

    The drafter expands the `width` likeliest nodes of a level, so a node of the topology whose
    parent was not among them does not exist in that step; it is left out and its share unused.
    """

    name = "static"

    def __init__(self, options: StaticOptions) -> None:
        super().__init__()
        self.paths = sorted(options.paths, key=lambda path: (len(path), path))
        self._next = _transitions(self.paths)  # [1 + P, R] path id of a path's r-th child, 0 = not in the tree
        parents = [len({p[:-1] for p in self.paths if len(p) == n}) for n in range(1, len(self.paths[-1]) + 1)]
        self._depth, self._width = len(parents), max(*parents, self._next.shape[1])

    def propose(self, load: LoadView) -> SpecPlan:
        nodes = min(len(self.paths), load.max_nodes)
        return SpecPlan(nodes * load.batch_size, len(self.paths[nodes - 1]), self._width)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """Exactly the topology's nodes, cut to its first ``budget / B`` paths, shorter paths first."""
        ids = path_ids(forest, self._next.to(forest.scores.device))
        return pack(forest, (ids > 0) & (ids <= plan.budget // forest.batch_size))


def path_ids(forest: Forest, transitions: Tensor) -> Tensor:
    """[B, M] int64: the path of the topology that a node is, 0 for none. Walks the levels, root first."""
    ranks = child_ranks(forest)
    inside = (ranks < transitions.shape[1]) & forest.exists
    ranks = ranks.clamp(max=transitions.shape[1] - 1)
    ids = torch.zeros_like(forest.parents)
    for depth in range(int(forest.depths.amax()) + 1 if forest.depths.numel() else 0):
        level = forest.depths == depth
        parents = forest.parents[:, level]
        parent_ids = ids.gather(1, parents.clamp(min=0))
        known = (parents < 0) if depth == 0 else (parent_ids > 0)
        ids[:, level] = torch.where(inside[:, level] & known, transitions[parent_ids, ranks[:, level]], 0)
    return ids


def child_ranks(forest: Forest) -> Tensor:
    """[B, M] int64: a node's place among its siblings by descending score, ties by index."""
    by_score = torch.where(forest.exists, forest.scores, float("-inf")).argsort(dim=1, descending=True, stable=True)
    family = forest.parents.gather(1, by_score)
    grouped = family.argsort(dim=1, stable=True)  # siblings together, best first
    order, family = by_score.gather(1, grouped), family.gather(1, grouped)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    first = torch.ones_like(family, dtype=torch.bool)
    first[:, 1:] = family[:, 1:] != family[:, :-1]
    start = torch.where(first, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, place - start)


def _transitions(paths: list[Path]) -> Tensor:
    """[1 + P, R] table over the sorted paths: row 0 is the root, row i + 1 is path i."""
    ids = {(): 0} | {path: i + 1 for i, path in enumerate(paths)}
    table = torch.zeros(len(ids), 1 + max(rank for path in paths for rank in path), dtype=torch.int64)
    for path in paths:
        table[ids[path[:-1]], path[-1]] = ids[path]
    return table
