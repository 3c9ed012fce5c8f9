"""ECHO's step decided for coded knobs on recorded forests: gates, batch-wide top-K, acceptance. Plain numpy.

The same decisions as `controllers.echo` with a given plan, without building a `Forest`: whether a
node is accepted depends only on whether its score is among the K best of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from echo_rl.env.levels import Restricted

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Gates = Sequence[tuple[int, float]]
NONE = np.float32(-np.inf)


@dataclass(frozen=True)
class Verdict:
    """What one step's speculation came to, for B requests and D levels."""

    accepted: Ints  # [B] nodes
    verified: int
    drafting: Ints  # [D] requests that drafted each depth
    reached: Ints  # [D] requests with a selected node at a depth whose path was accepted up to it
    hits: Ints  # [D] requests that accepted a node at a depth
    confidence: Floats  # [B] probability of the likeliest first token


class Table:
    """The forests of one width with everything that a decision needs, by position."""

    def __init__(self, recorded: Restricted, score_power: Sequence[float]) -> None:
        depths = recorded.path.shape[1]
        powers = np.asarray([*score_power, *[score_power[-1]] * depths] if score_power else [1.0] * depths, np.float32)
        self.starts = [recorded.nodes(d) for d in range(depths + 1)]
        self._depths, self._nodes = recorded.depths, recorded.path
        self._scores = recorded.scores * powers[recorded.depths]  # [P, M] calibrated
        rows = np.arange(len(recorded.path))[:, None]
        self._path = np.where(recorded.path >= 0, self._scores[rows, recorded.path], NONE)  # [P, D]
        levels = [recorded.scores[:, a:b].max(1) for a, b in pairwise(self.starts)]
        self._best = np.stack(levels, axis=1)  # [P, D] the likeliest path of each level, as drafted
        self._best_calibrated = self._best * powers[:depths]

    def decide(self, positions: Ints, budget: int, depth: int, gates: Gates, limit: int, floor: float = 0.0) -> Verdict:
        """`gates` are (depth, threshold); `limit` is the most nodes of one request, `floor` see `SpecPlan`."""
        best = self._best[positions, :depth]  # [B, d]
        stop = self._stops(best, depth, gates)
        scores = self._scores[positions, : self.starts[depth]]  # a copy
        path, tops = self._path[positions, :depth], self._best_calibrated[positions, :depth]
        if stop is not None:
            scores[self._depths[: self.starts[depth]] > stop[:, None]] = NONE
            beyond = np.arange(depth) > stop[:, None]
            path, tops = np.where(beyond, NONE, path), np.where(beyond, NONE, tops)
        if floor:
            least = np.float32(math.log(floor))
            scores, path, tops = (np.where(s >= least, s, NONE) for s in (scores, path, tops))
        threshold, verified = _threshold(scores, budget, limit)
        if budget < scores.size and int((scores >= threshold).sum()) > verified:
            taken, has = self._tied(scores, threshold, verified, positions, depth)
        else:
            taken, has = path >= threshold, tops >= threshold
        accepted = taken.sum(1)
        above = np.arange(depth)
        return Verdict(
            accepted,
            verified,
            np.full(depth, len(positions)) if stop is None else (stop[:, None] >= above).sum(0),
            (has & (accepted[:, None] >= above)).sum(0),
            (accepted[:, None] > above).sum(0),
            np.exp(best[:, 0]),
        )

    def _tied(
        self, scores: Floats, threshold: Floats, verified: int, positions: Ints, depth: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[B, d] whether the path's node is verified, and whether any is, where equal scores compete.

        They go to the earlier node, then to the earlier request, as in `controllers.base`.
        """
        wanted = np.where(scores >= threshold, scores, NONE).T  # [M, B]
        order = np.argsort(-wanted, axis=None, kind="stable")[:verified]
        picked = np.zeros(wanted.size, dtype=bool)
        picked[order] = True
        mask: NDArray[np.bool_] = picked.reshape(wanted.shape).T
        nodes = self._nodes[positions, :depth]
        rows = np.arange(len(mask))[:, None]
        has = np.stack([mask[:, a:b].any(1) for a, b in pairwise(self.starts[: depth + 1])], axis=1)
        return (nodes >= 0) & mask[rows, np.minimum(nodes, mask.shape[1] - 1)], has

    @staticmethod
    def _stops(best: Floats, depth: int, gates: Gates) -> Ints | None:
        """[B] the last level that each request drafts; None where no gate stops anyone."""
        stop = None
        for gate, tau in gates:
            if gate < depth - 1:
                failed = np.exp(best[:, gate]) < np.float32(tau)
                if failed.any():
                    stop = np.full(len(best), depth - 1) if stop is None else stop
                    stop = np.where(failed, np.minimum(stop, gate), stop)
        return stop


def _threshold(scores: Floats, budget: int, limit: int) -> tuple[Floats, int]:
    """The least score that is verified ([B, 1], or one for all), and how many nodes that makes."""
    if limit < min(budget, scores.shape[1]):
        return _limited(scores, budget, limit)
    flat = scores.reshape(-1)
    finite = len(flat) - int((flat == NONE).sum())
    if finite <= budget:
        return np.full((1, 1), np.finfo(np.float32).min, np.float32), finite
    place = len(flat) - budget
    return np.partition(flat, place)[place].reshape(1, 1), budget


def _limited(scores: Floats, budget: int, limit: int) -> tuple[Floats, int]:
    """As `_threshold`, where one request could take more than its limit."""
    place = scores.shape[1] - limit
    own = np.partition(scores, place, axis=1)[:, place : place + 1]  # [B, 1] each request's limit-th best
    own = np.maximum(own, np.finfo(np.float32).min)
    common, verified = _threshold(np.where(scores >= own, scores, NONE), budget, scores.shape[1])
    return np.maximum(common, own), verified
