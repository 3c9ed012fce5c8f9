"""Forest levels over many positions at once, and the part of them that a narrower plan drafts. Pure numpy.

Shapes: P positions, F expanded nodes a level (padded), W children each, M nodes of a restricted forest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """The candidates of one depth."""

    scores: Floats  # [P, F, W] path log-probabilities, best child first; -inf where padded
    parents: Ints  # [P, F] the expanded node as a place (f * W + child) in the level above; -1 where padded or root
    path: Ints  # [P] place of the candidate that the target chose, -1 where it isn't among them


@dataclass(frozen=True)
class Restricted:
    """The forests of one width, nodes in the order in which the runtime drafts them: level by level."""

    width: int
    scores: Floats  # [P, M] path log-probabilities, M = width + (D - 1) * width**2
    parents: Ints  # [P, M] node, -1 for a child of the root
    depths: Ints  # [M]
    path: Ints  # [P, D] the accepted node at each depth, -1 from where none is drafted

    def nodes(self, depth: int) -> int:
        """Nodes of the first `depth` levels."""
        return self.width + (depth - 1) * self.width**2 if depth else 0


@dataclass(frozen=True)
class _Drafted:
    """One level as a plan of some width drafts it."""

    scores: Floats  # [P, n]
    places: Ints  # [P, n] in the recorded level
    parents: Ints  # [P, n] in the level above as drafted, -1 at depth 0
    groups: Ints  # [P, w] expanded nodes, in the recorded level
    found: NDArray[np.bool_]  # [P, w] whether they were recorded


def restrict(levels: Sequence[Level], width: int) -> Restricted:
    """The forests that a plan of `width` would have drafted, one for each position."""
    drafted = list(_walk(levels, width))
    sizes = [level.scores.shape[1] for level in drafted]
    starts = np.cumsum([0, *sizes])
    parents = [
        np.where(level.parents >= 0, level.parents + starts[max(0, d - 1)], -1) for d, level in enumerate(drafted)
    ]
    path, on = [], np.ones(len(levels[0].scores), dtype=bool)
    for d, (level, recorded) in enumerate(zip(drafted, levels, strict=True)):
        match = level.places == recorded.path[:, None]
        on &= match.any(1) & (recorded.path >= 0)
        path.append(np.where(on, match.argmax(1) + starts[d], -1))
    return Restricted(
        width,
        np.concatenate([level.scores for level in drafted], axis=1),
        np.concatenate(parents, axis=1),
        np.repeat(np.arange(len(drafted)), sizes),
        np.stack(path, axis=1),
    )


def beams(levels: Sequence[Level], width: int) -> list[NDArray[np.bool_]]:
    """For each level, the expanded nodes ([P, F] bool) that a plan of some width up to `width` expands."""
    needed = [np.zeros(level.parents.shape, dtype=bool) for level in levels]
    for w in range(1, width + 1):
        for mask, level in zip(needed, _walk(levels, w), strict=True):
            rows = np.broadcast_to(np.arange(len(mask))[:, None], level.groups.shape)
            mask[rows[level.found], level.groups[level.found]] = True
    return needed


def _walk(levels: Sequence[Level], width: int) -> Iterator[_Drafted]:
    """Level by level: the best `width` nodes of the level above, `width` children of each."""
    positions = len(levels[0].scores)
    rows = np.arange(positions)[:, None]
    places = np.broadcast_to(np.arange(width), (positions, width))
    scores = levels[0].scores[:, 0, :width]
    root = np.zeros((positions, 1), dtype=np.int64)
    yield _Drafted(scores, places, np.full_like(places, -1), root, root == 0)
    for level in levels[1:]:
        beam = np.argsort(-scores, axis=1, kind="stable")[:, :width]  # best first
        match = level.parents[:, None, :] == places[rows, beam][:, :, None]  # [P, w, F] the beam nodes' children
        groups, found = match.argmax(2), match.any(2)
        children = np.where(found[:, :, None], level.scores[rows, groups, :width], -np.inf)
        scores = children.reshape(positions, -1)
        places = (groups[:, :, None] * level.scores.shape[2] + np.arange(width)).reshape(positions, -1)
        yield _Drafted(scores, places, np.repeat(beam, width, axis=1), groups, found)
