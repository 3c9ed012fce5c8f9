"""ECHO's step decided for coded knobs on recorded forests: gates, batch-wide top-K, acceptance. Plain numpy.

The same decisions as `controllers.echo` with a given plan, without building a `Forest`: whether a
node is accepted depends only on whether its score is among the K best of the batch. Many servers decide at
once; only the K best are found one server after the other.

Shapes: E servers, R requests of all servers (server by server), b of one; P positions, M nodes, D = `DEPTHS` levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec import DEPTHS
from echo_rl.contracts import least_score
from echo_rl.replay.levels import Restricted

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
NONE = np.float32(-np.inf)
LEVELS = np.arange(DEPTHS)


@dataclass(frozen=True)
class BatchedPlan:
    """The plans of all servers, [E] each; see `SpecPlan`."""

    budget: Ints  # 0: don't speculate
    depth: Ints  # 0 where the budget is
    width: Ints
    gates: Floats  # [E, D] see `SpecPlan`, `NO_GATE` where there is none
    floor: NDArray[np.float64]  # see `SpecPlan`


@dataclass(frozen=True)
class VectorVerdict:
    """The nodes that one step drafted, verified and accepted."""

    accepted: Ints  # [R] nodes
    first: Floats  # [R] probability of the likeliest first token
    verified: NDArray[np.float64]  # [E] nodes
    drafting: NDArray[np.float64]  # [E, D] requests that drafted each depth
    reached: NDArray[np.float64]  # [E, D] requests with a selected node at a depth whose path was accepted up to it
    hits: NDArray[np.float64]  # [E, D] requests that accepted a node at a depth


class ForestTables:
    """The forests of some widths with everything that a decision needs, by width and position."""

    def __init__(self, recorded: Sequence[Restricted], score_power: Sequence[float]) -> None:
        self._tables = [_ForestTable(forests, score_power) for forests in recorded]
        self._place = np.full(1 + max(forests.width for forests in recorded), -1)
        self._place[[forests.width for forests in recorded]] = np.arange(len(recorded))
        self._positions = len(recorded[0].path)
        self._levels = np.concatenate([table.levels for table in self._tables])  # [W * P, 3, D]

    def __deepcopy__(self, memo: dict[int, object]) -> ForestTables:
        """The tables themselves, which never change."""
        return self

    def decide(self, positions: Ints, counts: Ints, plan: BatchedPlan, limit: int) -> VectorVerdict:
        """`positions` [R], of which `counts` [E] (each at least 1) a server; `limit` is the most nodes of a request."""
        owner, begins = np.repeat(np.arange(len(counts)), counts), counts.cumsum() - counts
        places = self._place[plan.width]
        assert places.min() >= 0, "a plan of a width that these tables lack"
        levels = self._levels.take(places[owner] * self._positions + positions, axis=0)
        stop = _stops(levels[:, 0], plan.gates[owner], plan.depth[owner])
        drafted = stop[:, None] >= LEVELS
        threshold, verified = np.full(len(owner), np.inf, dtype=np.float32), np.zeros(len(counts))
        stops, contests = stop.tolist(), []
        numbers = (a.tolist() for a in (plan.budget, plan.floor, places, begins, begins + counts))
        for server, (budget, floor, place, begin, end) in enumerate(zip(*numbers, strict=True)):
            if budget:
                table, mine = self._tables[place], slice(begin, end)
                scores = table.drafted(positions[mine], stops[mine])
                threshold[mine], verified[server], competing = _threshold(scores, budget, limit, least_score(floor))
                if competing is not None:
                    contests.append((table, mine, competing, int(verified[server])))
        taken = (levels[:, 1:] >= threshold[:, None, None]) & drafted[:, None]  # the path's node, any node
        for table, mine, scores, count in contests:
            taken[mine] = table.contest(positions[mine], scores, count)
        accepted = taken[:, 0].sum(1)
        deep = np.stack([drafted, taken[:, 1] & (accepted[:, None] >= LEVELS), accepted[:, None] > LEVELS])
        drafting, reached, hits = np.add.reduceat(deep, begins, axis=1, dtype=np.float64)
        return VectorVerdict(accepted, levels[:, 0, 0], verified, drafting, reached, hits)


class _ForestTable:
    """The forests of one width, by position."""

    def __init__(self, recorded: Restricted, score_power: Sequence[float]) -> None:
        depths = min(recorded.path.shape[1], DEPTHS)
        powers = np.asarray([*score_power, *[score_power[-1]] * depths] if score_power else [1.0] * depths, np.float32)
        self._starts = [recorded.nodes(d) for d in range(depths + 1)]
        size, self._nodes = self._starts[-1], recorded.path[:, :depths]
        self._scores = recorded.scores[:, :size] * powers[recorded.depths[:size]]  # [P, M] calibrated
        rows = np.arange(len(self._nodes))[:, None]
        best = np.stack([recorded.scores[:, a:b].max(1) for a, b in pairwise(self._starts)], axis=1)
        self.levels = np.full((len(rows), 3, DEPTHS), NONE)
        """[P, 3, D] the likeliest path's probability as drafted; calibrated scores of the target's node, of the best"""
        self.levels[:, 0, :depths] = np.exp(best)
        self.levels[:, 1, :depths] = np.where(self._nodes >= 0, self._scores[rows, self._nodes], NONE)
        self.levels[:, 2, :depths] = best * powers[:depths]

    def drafted(self, positions: Ints, stops: Sequence[int]) -> Floats:
        """[b, M] the scores down to each request's last level, M nodes down to the last of all."""
        last = max(stops)
        scores = self._scores[positions, : self._starts[last + 1]]  # a copy
        for row, stop in enumerate(stops):
            if stop < last:
                scores[row, self._starts[stop + 1] :] = NONE
        return scores

    def contest(self, positions: Ints, scores: Floats, verified: int) -> Bools:
        """[b, 2, D] whether the path's node is verified, and whether any is, where equal scores ([b, M]) compete.

        They go to the earlier node, then to the earlier request, as in `controllers.selection`.
        """
        picked = np.zeros(scores.size, dtype=bool)
        picked[np.argsort(-scores.T, axis=None, kind="stable")[:verified]] = True
        mask: Bools = picked.reshape(scores.T.shape).T
        taken = np.zeros((len(mask), 2, DEPTHS), dtype=bool)
        nodes, rows = self._nodes[positions], np.arange(len(mask))[:, None]
        inside = (nodes >= 0) & (nodes < mask.shape[1])
        taken[:, 0, : nodes.shape[1]] = inside & mask[rows, np.where(inside, nodes, 0)]
        for level, (begin, end) in enumerate(pairwise(self._starts)):
            taken[:, 1, level] = mask[:, begin:end].any(1)
        return taken


def _stops(best: Floats, gates: Floats, depth: Ints) -> Ints:
    """[R] the last level that each request drafts: of the first gate that it fails, else the plan's."""
    failed = best < gates
    stops: Ints = np.where(failed.any(1), failed.argmax(1), depth - 1)
    return stops


def _threshold(scores: Floats, budget: int, limit: int, least: float) -> tuple[Floats | float, int, Floats | None]:
    """The least score that is verified ([b], or one for all), how many nodes that makes, and the scores that compete.

    They are None where the least score tells all; else more nodes have it than there is room for.
    """
    if limit < min(budget, scores.shape[1]):  # one request could take more than its limit
        place = scores.shape[1] - limit
        own = np.maximum(np.partition(scores, place, axis=1)[:, place], least)  # [b] each request's limit-th best
        scores, tied = _limited(scores, own, limit)
        common, verified, competing = _threshold(scores, budget, budget, least)
        return np.maximum(common, own), verified, scores if tied else competing
    flat = scores[scores >= least]  # many equal scores, as of what isn't there, are what partitioning is slowest at
    if budget < len(flat):
        place = len(flat) - budget
        least = max(least, float(np.partition(flat, place)[place]))
    wanted = int(np.count_nonzero(flat >= least))
    return least, min(budget, wanted), scores if wanted > budget else None


def _limited(scores: Floats, own: Floats, limit: int) -> tuple[Floats, bool]:
    """Each request's `limit` best scores, `NONE` for the others, and whether it took the order of nodes to tell."""
    kept = scores >= own[:, None]
    tied = bool((kept.sum(1) > limit).any())
    if tied:
        first = np.argsort(-scores, axis=1, kind="stable")[:, :limit]
        among = np.zeros_like(kept)
        np.put_along_axis(among, first, True, axis=1)
        kept &= among
    return np.where(kept, scores, NONE), tied
