"""Finds the trees that a budget affords, and the accepted nodes expected of a tree of a given size.

The *rank model* stands behind both: a node's r-th child (r = 0 best) is the target's token with
probability ``p * (1 - p)**r``. It is only a prior over shapes: `acceptance` corrects its yields by
what is measured, and the drafter's own scores decide which nodes are verified (`base`).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache

REFERENCE_HIT = 0.6
"""Probability that a typical first choice is accepted (p)."""
HIT_SPREAD = 3.0
"""Easy, typical and hard positions differ by this much in the log-odds of p. Of 1.2, 1.8, 2.4 and 3.0 this one carries
yields best from one tree size to another (replays of the shipped trace, batch 64, 1 to 23 nodes a request: mean
absolute error of tokens a step 10 %, 6 %, 4.4 %, 4.1 %)."""
MAX_DEPTH = 8
"""Levels of ECHO's deepest published tree."""

WIDTHS = (1, 2, 3, 4, 6)
"""Widths to compare, besides the widest that a budget pays for."""

LIGHT = (5.0, 3, 3)
HEAVY = (60.0, MAX_DEPTH, 10)
"""ECHO's two published set-ups as (nodes a request, depth, width): under high load, and at batch 1."""


def affordable(nodes: float) -> tuple[int, int]:
    """The deepest and widest drafting (depth, width) that `nodes` a request pay for.

    Between ECHO's set-ups both grow linearly in log(nodes), clamped above. Below the light one the
    depth stays 3, since the scheduler may give a confident request several of the few nodes, and the
    width is one spare candidate more than nodes: ``min(3, 1 + round(nodes))``.
    """
    (light, shallow, narrow), (heavy, deep, wide) = LIGHT, HEAVY
    if nodes < light:
        return shallow, min(narrow, 1 + round(nodes))
    share = min(1.0, math.log(nodes / light) / math.log(heavy / light))
    return round(shallow + share * (deep - shallow)), round(narrow + share * (wide - narrow))


def affordable_trees(nodes: float) -> list[tuple[float, int, int]]:
    """Trees worth comparing for a budget, as (`nodes` a request, depth, width).

    Up to the `affordable` depth and width; where a narrower tree holds the budget too, drafting it takes less.
    """
    deepest, widest = affordable(nodes)
    widths = [*(w for w in WIDTHS if w < widest), widest]
    return [(nodes, d, w) for d in range(1, deepest + 1) for w in widths if nodes <= w + (d - 1) * w * w]


def likeliest_tree(nodes: int, depth: int, hit: float = REFERENCE_HIT) -> tuple[tuple[int, ...], ...]:
    """The `nodes` likeliest paths of at most `depth` levels under the rank model, most likely first.

    A path is its child ranks: (0, 1) is the first child's second child. Parents precede children.
    """
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-hit, 1, (0,))]
    tree: list[tuple[int, ...]] = []
    while heap and len(tree) < nodes:
        value, length, path = heapq.heappop(heap)
        tree.append(path)
        heapq.heappush(heap, (value * (1.0 - hit), length, (*path[:-1], path[-1] + 1)))
        if length < depth:
            heapq.heappush(heap, (value * hit, length + 1, (*path, 0)))
    return tuple(tree)


def pooled_yield(nodes: float, depth: int, width: int, hit: float) -> tuple[float, ...]:
    """[MAX_DEPTH] accepted nodes a request at each depth, when one budget serves many requests.

    An equal mix of easy, typical and hard requests is given ``nodes`` a request, likeliest first
    over all of them (ECHO's Theorem 2 under the rank model). Fractions of a node are exact.
    """
    return _mix(depth, width, hit).best(3.0 * nodes)


def separate_yield(nodes: float, depth: int, width: int, hit: float) -> tuple[float, ...]:
    """[MAX_DEPTH] as `pooled_yield`, when every request keeps its own equal share."""
    parts = [kind.best(nodes) for kind in _kinds(depth, width, hit)]
    return tuple(sum(levels) for levels in zip(*parts, strict=True))


Group = tuple[float, int, int]
"""(probability of a node, depth, how many such nodes there are)."""


class _Curve:
    """A third of the summed probability of the likeliest n nodes, by depth; linear within equal nodes."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = sorted(groups, reverse=True)
        self._nodes, self._levels = [0.0], [(0.0,) * MAX_DEPTH]
        for value, depth, count in self.groups:
            levels = list(self._levels[-1])
            levels[depth] += count * value / 3.0
            self._nodes.append(self._nodes[-1] + count)
            self._levels.append(tuple(levels))

    def best(self, nodes: float) -> tuple[float, ...]:
        whole = bisect_right(self._nodes, nodes) - 1
        if whole == len(self.groups):
            return self._levels[-1]
        value, depth, _ = self.groups[whole]
        levels = list(self._levels[whole])
        levels[depth] += (nodes - self._nodes[whole]) * value / 3.0
        return tuple(levels)


@lru_cache(maxsize=1024)
def _kinds(depth: int, width: int, hit: float) -> tuple[_Curve, ...]:
    """An easy, a typical and a hard request, whose nodes have `width` children each.

    A node at depth d whose ranks sum to s has probability ``p**(d+1) * (1-p)**s``. Ranks past 12 in sum are left out:
    no budget reaches them.
    """
    odds = math.log(hit / (1.0 - hit))
    kinds = []
    for shift in (HIT_SPREAD, 0.0, -HIT_SPREAD):
        p = 1.0 / (1.0 + math.exp(-odds - shift))
        kinds.append(
            _Curve((p ** (d + 1) * (1 - p) ** s, d, n) for d in range(depth) for s, n in enumerate(_paths(d, width)))
        )
    return tuple(kinds)


@lru_cache(maxsize=1024)
def _mix(depth: int, width: int, hit: float) -> _Curve:
    return _Curve(group for kind in _kinds(depth, width, hit) for group in kind.groups)


@lru_cache(maxsize=128)
def _paths(depth: int, width: int) -> tuple[int, ...]:
    """[s] number of paths down to `depth` whose ranks below `width` sum to s, up to 12."""
    if depth < 0:
        return (1,)
    above = _paths(depth - 1, width)
    most = min(12, (depth + 1) * (width - 1))
    return tuple(sum(above[s - r] for r in range(width) if 0 <= s - r < len(above)) for s in range(most + 1))
