"""Shapes trees by a request's own confidence: EAGLE-2, Dynamic Depth Decoding, TALON, OPT-Tree.

Each is EAGLE's tree (`fixed.Eagle3`: expand the likeliest `top_k` of a level, pool their children,
verify the best `total`) with one more rule. They consider one request at a time and know nothing of
load, batch or cost. The runtime expands `top_k` nodes of every request that still drafts, so a rule
that would expand fewer is applied to which nodes are verified and to when drafting stops.

Shapes: B requests, F candidates of a level, M forest nodes a request, D levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from echo_rl.contracts import NO_GATE, Forest, Frontier, Gates, LoadView, Selection, SpecPlan
from echo_rl.controllers.baselines.fixed import Eagle3, Eagle3Options
from echo_rl.controllers.selection import MISSING, pack, per_request_top_k
from echo_rl.errors import ConfigError

Values = Mapping[str, tuple[Any, ...]]
"""Option -> the values worth trying. They stay within depth 8 and width 8, which recordings hold."""


@dataclass(frozen=True)
class TreeOptions(Eagle3Options):
    total: int = 59
    """Drafted nodes that a request may have verified (60 with its root)."""
    depth: int = 8
    """Levels; EAGLE's code counts one less, since its first level precedes its loop."""
    top_k: int = 10
    """Nodes expanded a level, and children of each."""


@dataclass(frozen=True)
class Eagle2Options(TreeOptions):
    depth: int = 6
    """Levels (5 in EAGLE-2's code)."""
    TUNABLE: ClassVar[Values] = {"total": (3, 7, 15, 59), "depth": (3, 6), "top_k": (3, 5, 8)}


class Eagle2(Eagle3):
    """EAGLE-2's default tree (arXiv 2406.16858): `Eagle3` two levels shallower."""

    name = "eagle2"


@dataclass(frozen=True)
class DddOptions(TreeOptions):
    depth: int = 11
    """Most levels."""
    top_k: int = 9
    """The paper's beam is 10; with 11 levels that would be more than the engine's default `max_expanded`."""
    tau: float = -1.0
    """Least log of the beam's summed path probability; to be calibrated, the drafter decides what is low."""
    checks: tuple[int, ...] = (5, 7, 9)
    """Levels drafted (from 1) after which the beam is checked."""
    TUNABLE: ClassVar[Values] = {
        "tau": (-1.5, -1.0, -0.5), "total": (3, 7, 15, 59), "top_k": (4, 8), "depth": (8,),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.tau) or self.tau > math.log(self.top_k):
            raise ConfigError(f"ddd tau is {self.tau}; give the log of a sum of {self.top_k} probabilities")
        if any(check < 1 for check in self.checks) or any(b <= a for a, b in pairwise(self.checks)):
            raise ConfigError(f"ddd checks are {self.checks}; give increasing levels from 1")


class Ddd(Eagle3):
    """Dynamic Depth Decoding (arXiv 2409.00142): stop where ``logsumexp(beam) < tau``, asked at a few levels only."""

    name = "ddd"
    options: DddOptions

    def propose(self, load: LoadView) -> SpecPlan:
        options = self.options
        gates = tuple((check - 1, 0.0) for check in options.checks if check < options.depth)
        return replace(super().propose(load), gates=gates)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose `top_k` likeliest paths hold at least ``exp(tau)`` of the probability."""
        mass = beam(frontier, plan).sum(1)
        return frontier.alive & (mass >= math.exp(self.options.tau))


@dataclass(frozen=True)
class TalonOptions(TreeOptions):
    total: int = 60
    """The node budget."""
    depth: int = 10
    """Most levels; the published rule has no other limit than the budget."""
    mu: float = 0.03
    """Least path probability of a node, relative to its level's likeliest (.01 to .04 in the paper)."""
    TUNABLE: ClassVar[Values] = {
        "mu": (0.01, 0.03, 0.04), "total": (5, 10, 20, 60), "top_k": (4, 8), "depth": (8,),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mu <= 1.0:
            raise ConfigError(f"talon mu is {self.mu}; give a share in (0, 1]")


class Talon(Eagle3):
    """TALON (arXiv 2601.07353): the root's `top_k`, then every node near its level's best, until the budget is full.

    A level that overfills the budget keeps its likeliest nodes. While drafting, parents are not in
    view, so a likely node below a dropped one is counted although `select` then drops it.
    """

    name = "talon"
    options: TalonOptions

    def __init__(self, options: TalonOptions) -> None:
        super().__init__(options)
        self._grown = torch.empty(0, dtype=torch.int64)  # [B] nodes kept so far in this step

    def propose(self, load: LoadView) -> SpecPlan:
        return replace(super().propose(load), gates=every_level(self.options.depth))

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose kept nodes do not fill the budget yet."""
        near = probabilities(frontier.scores)
        floor = self.options.mu * near.amax(1, keepdim=True) if frontier.depth else 0.0
        kept = ((near > 0.0) & (near >= floor)).sum(1)
        self._grown = self._grown + kept if frontier.depth else kept
        return frontier.alive & (self._grown < plan.budget // len(frontier.alive))

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """Whole levels of kept nodes while they fit, then the likeliest of the next."""
        limit, depths = plan.budget // forest.batch_size, forest.depths
        kept = self._kept(forest)
        counts = depths.new_zeros(forest.batch_size, int(depths[-1]) + 1)  # [B, D] kept nodes
        counts = counts.scatter_add(1, depths.expand_as(forest.parents), kept.long())
        end = counts.cumsum(1)
        if int(end[:, -1].amax()) <= limit:
            return pack(forest, kept)
        whole = kept & (end <= limit).index_select(1, depths)
        next_level = kept & ((end > limit) & (end - counts < limit)).index_select(1, depths)
        rest = replace(forest, scores=forest.scores.masked_fill(~next_level, NO_GATE))
        return pack(forest, whole | per_request_top_k(rest, limit - whole.sum(1)))

    def _kept(self, forest: Forest) -> Tensor:
        """[B, M] bool: nodes that are near their level's best, as are all their ancestors; the first level whole."""
        scores, depths = existing(forest.scores), forest.depths
        best = scores.new_full((forest.batch_size, int(depths[-1]) + 1), MISSING)
        floor = best.scatter_reduce(1, depths.expand_as(forest.parents), scores, "amax") + math.log(self.options.mu)
        floor[:, 0] = MISSING
        return closed(forest, scores >= floor.index_select(1, depths))


@dataclass(frozen=True)
class OptTreeOptions(TreeOptions):
    total: int = 60
    depth: int = 10
    """Most levels."""
    threshold: float = 0.5
    """Least gain in E(A), in accepted nodes, that pays for one more level (.5 to .7; .5 with EAGLE drafters)."""
    TUNABLE: ClassVar[Values] = {
        "threshold": (0.3, 0.5, 0.7), "total": (3, 7, 15, 60), "top_k": (4, 8), "depth": (8,),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold < math.inf:
            raise ConfigError(f"opt_tree threshold is {self.threshold}; give accepted nodes a level, 0 or more")


class OptTree(Eagle3):
    """OPT-Tree (arXiv 2406.17276): E(A) is the sum of the `total` likeliest paths; draft while a level adds enough."""

    name = "opt_tree"
    options: OptTreeOptions

    def __init__(self, options: OptTreeOptions) -> None:
        super().__init__(options)
        self._best = torch.empty(0)  # [B, <= total] probabilities of the likeliest nodes so far in this step
        self._expected = torch.empty(0)  # [B] their sum

    def propose(self, load: LoadView) -> SpecPlan:
        return replace(super().propose(load), gates=every_level(self.options.depth))

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose E(A) this level raised by more than the threshold."""
        best = probabilities(frontier.scores)
        before = self._expected if frontier.depth else torch.zeros_like(best[:, 0])
        if frontier.depth:
            best = torch.cat([self._best, best], dim=1)
        total = plan.budget // len(frontier.alive)
        self._best = best.topk(total, dim=1, sorted=False).values if best.shape[1] > total else best
        self._expected = self._best.sum(1)
        return frontier.alive & (self._expected - before > self.options.threshold)


def every_level(depth: int) -> Gates:
    """Gates that ask `extend` after every level but the last, for a rule that needs no threshold of the plan."""
    return tuple((level, 0.0) for level in range(depth - 1))


def existing(scores: Tensor) -> Tensor:
    """The scores, with -inf also for what is NaN."""
    return scores.nan_to_num(nan=NO_GATE, neginf=NO_GATE)


def probabilities(scores: Tensor) -> Tensor:
    """Path probabilities, 0 for what does not exist."""
    return scores.exp().nan_to_num_(nan=0.0)


def beam(frontier: Frontier, plan: SpecPlan) -> Tensor:
    """[B, <= width] probabilities of the candidates that would be expanded next, likeliest first."""
    near = probabilities(frontier.scores)
    return near.topk(min(plan.width, near.shape[1]), dim=1).values


def closed(forest: Forest, mask: Tensor) -> Tensor:
    """[B, M] bool: the nodes of the mask whose ancestors are all in it. Drops orphans until there are none."""
    places = torch.arange(mask.shape[1], device=mask.device)
    above = torch.where(forest.parents < 0, places, forest.parents)  # a child of the root stands for itself
    while not torch.equal(smaller := mask & mask.gather(1, above), mask):
        mask = smaller
    return mask
