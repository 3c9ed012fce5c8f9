"""Grows trees: the drafter proposes level by level for the whole batch, gates stop unlikely requests.

Each level expands the `width` best candidates of the level before and pools all their children
(EAGLE-2's dynamic tree). Requests that a gate stopped keep the candidates they have. A *nested*
forest expands the union of what every width up to the plan's would have expanded, so that each
narrower forest is a part of it: a recording needs one pass for all widths.

The tree is kept in NumPy: of these many small operations the host does each in a fraction of the time
that a tensor's would take. Only what the drafter computes with is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from echo_rl.contracts import NO_GATE, Forest, Frontier, SpecPlan
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.layout import Layout

Extend = Callable[[Frontier, SpecPlan], torch.Tensor]
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Level:
    """Candidates of one level, all requests (B), C a request; -inf where a request didn't draft."""

    tokens: Ints  # [B, C]
    scores: Floats  # [B, C]
    parents: Ints  # [B, C] node index in the row


@dataclass(frozen=True)
class _Expansion:
    """The nodes that the drafter runs on next: F for each of A requests still alive."""

    requests: Ints  # [A]
    nodes: Ints  # [A, F] node index in the row
    tokens: Ints  # [A, F]
    scores: Floats  # [A, F]
    features: torch.Tensor  # [A, F, hidden], the parents' hidden states
    mask: Bools  # [A, F, E], expanded ancestors so far
    beams: Bools  # [W, A, F], whose beam the node is in: of the plan's width, or of each width up to it


def grow(
    drafter: Drafter, cache: KVCache, layout: Layout, roots: torch.Tensor, plan: SpecPlan, extend: Extend
) -> Forest:
    """`roots` [B, hidden] are the drafter's states at each request's last committed pair."""
    batch = len(roots)
    log_probs, tokens = _top(drafter, roots, plan)
    levels = [_Level(tokens, log_probs, np.full_like(tokens, -1))]
    alive = np.ones(batch, dtype=np.bool_)
    stop_depth = np.zeros(batch, dtype=np.int64)
    front, first_node = _first(roots, levels[0], plan), tokens.shape[1]
    for depth in range(1, plan.max_depth):
        front, alive = _gate(front, alive, levels[-1], depth - 1, plan, extend, layout)
        if not len(front.requests):
            break
        stop_depth[front.requests] = depth
        hidden, mask = _run(drafter, cache, layout, front, depth)
        level = _children(drafter, front, hidden, plan)
        levels.append(_of_all(level, front.requests, batch))
        if depth + 1 < plan.max_depth:
            front = _following(front, level, hidden, mask, plan, first_node, layout)
        first_node += level.tokens.shape[1]
    return _forest(levels, stop_depth, layout)


def _top(drafter: Drafter, hidden: torch.Tensor, plan: SpecPlan) -> tuple[Floats, Ints]:
    """The children of nodes [N, hidden]: log-probabilities and tokens, both [N, fan], best first."""
    log_probs, tokens = drafter.top(hidden, plan.width)
    return log_probs.cpu().numpy(), tokens.cpu().numpy()


def _first(roots: torch.Tensor, level: _Level, plan: SpecPlan) -> _Expansion:
    """All of the root's children are expanded."""
    batch, width = level.tokens.shape
    return _Expansion(
        requests=np.arange(batch),
        nodes=np.arange(width)[None].repeat(batch, 0),
        tokens=level.tokens,
        scores=level.scores,
        features=roots[:, None].expand(-1, width, -1),
        mask=np.zeros((batch, width, 0), dtype=np.bool_),
        beams=_first_beams(batch, width, plan),
    )


def _gate(
    front: _Expansion, alive: Bools, level: _Level, depth: int, plan: SpecPlan, extend: Extend, layout: Layout
) -> tuple[_Expansion, Bools]:
    """Ask the controller at a gated depth; drop the requests it stops from the expansion."""
    if plan.gate(depth) is None:
        return front, alive
    answer = extend(Frontier(depth, layout.tensor(level.scores), layout.tensor(alive)), plan)
    still = alive & answer.cpu().numpy()
    if still.sum() == alive.sum():  # the common case: a gate that stops nobody costs next to nothing
        return front, alive
    keep = still[front.requests]
    kept = _Expansion(
        front.requests[keep], front.nodes[keep], front.tokens[keep], front.scores[keep],
        front.features[layout.tensor(keep)], front.mask[keep], front.beams[:, keep],
    )  # fmt: skip
    return kept, still


def _run(drafter: Drafter, cache: KVCache, layout: Layout, front: _Expansion, depth: int) -> tuple[torch.Tensor, Bools]:
    """Drafter over the expansion: hidden [A * F, hidden] and the mask including the rows themselves [A, F, E + F].

    The expansion's nodes have `depth` - 1 ancestors in the tree.
    """
    alive, width = front.tokens.shape
    before = front.mask.shape[2]
    mask = np.concatenate([front.mask, np.broadcast_to(_identity(width), (alive, width, width))], axis=2)
    context = layout.host_kv_lens[front.requests]  # [A]
    slots = layout.host_slots(front.requests[:, None], context[:, None] + np.arange(before, before + width))
    starts = np.arange(0, alive * width + 1, width, dtype=np.int32)
    rows = layout.tensor(mask.reshape(alive * width, -1))
    view = layout.host_view(slots.reshape(-1), starts, context, before + width, rows, front.requests)
    hidden = drafter.forward(
        layout.tensor(front.tokens.reshape(-1)), front.features.reshape(alive * width, -1).contiguous(),
        layout.tensor((context + (depth - 1)).repeat(width)), cache, view,
    )  # fmt: skip
    return hidden, mask


def _children(drafter: Drafter, front: _Expansion, hidden: torch.Tensor, plan: SpecPlan) -> _Level:
    """The children of the expanded nodes of the A requests still alive."""
    alive, expanded = front.tokens.shape
    log_probs, tokens = _top(drafter, hidden, plan)
    scores = front.scores[:, :, None] + log_probs.reshape(alive, expanded, -1)
    parents = front.nodes.repeat(tokens.shape[1], axis=1)
    return _Level(tokens.reshape(alive, -1), scores.reshape(alive, -1), parents)


def _following(
    front: _Expansion,
    level: _Level,
    hidden: torch.Tensor,
    mask: Bools,
    plan: SpecPlan,
    first_node: int,
    layout: Layout,
) -> _Expansion:
    """The best of a level of the expansion's children as the next expansion; the level's first is `first_node`."""
    (alive, expanded), children = front.tokens.shape, level.tokens.shape[1]
    fan = children // expanded
    best, beams = _best(level.scores, front.beams, fan, plan)
    places = best + _row_starts(alive, children)
    parents = best // fan + _row_starts(alive, expanded)
    features = hidden.index_select(0, layout.tensor(parents.reshape(-1)))
    return _Expansion(
        front.requests, first_node + best, level.tokens.reshape(-1)[places], level.scores.reshape(-1)[places],
        features.view(*best.shape, -1), mask.reshape(alive * expanded, -1)[parents], beams,
    )  # fmt: skip


def _of_all(level: _Level, requests: Ints, batch: int) -> _Level:
    """A level of the A requests still alive as one of all B."""
    if len(requests) == batch:
        return level
    shape = batch, level.tokens.shape[1]
    full = _Level(
        np.zeros(shape, dtype=np.int64), np.full(shape, NO_GATE, dtype=np.float32), np.zeros(shape, dtype=np.int64)
    )
    for part, whole in ((level.tokens, full.tokens), (level.scores, full.scores), (level.parents, full.parents)):
        whole[requests] = part
    return full


@lru_cache(maxsize=64)
def _identity(size: int) -> Bools:
    """[size, size]. Shared by all callers: to be read only, as `_row_starts`."""
    return np.eye(size, dtype=np.bool_)


@lru_cache(maxsize=256)
def _row_starts(rows: int, width: int) -> Ints:
    """[rows, 1] the place of each row's first element in a flat [rows, width]."""
    return np.arange(0, rows * width, width)[:, None]


def _first_beams(batch: int, width: int, plan: SpecPlan) -> Bools:
    """[W, B, width]: the root's first w children are the first beam of width w."""
    if not plan.nested:
        return np.ones((1, batch, width), dtype=np.bool_)
    return (np.arange(width) < np.arange(1, plan.width + 1)[:, None])[:, None].repeat(batch, 1)


def _best(scores: Floats, beams: Bools, fan: int, plan: SpecPlan) -> tuple[Ints, Bools]:
    """The candidates to expand next: their places in `scores` [A, F * fan], best first, and the beams they are in."""
    if not plan.nested:
        best = _highest(scores, plan.width)
        return best, beams[:, :, :1].repeat(best.shape[1], 2)
    rank = np.arange(scores.shape[1]) % fan
    union = np.zeros((len(beams), *scores.shape), dtype=np.bool_)  # [W, A, F * fan]
    rows = np.arange(len(scores))[:, None]
    for width, beam in enumerate(beams, 1):
        hidden = np.where(beam.repeat(fan, axis=1) & (rank < width), scores, NO_GATE)
        top = _highest(hidden, width)
        union[width - 1, rows, top] = hidden[rows, top] > NO_GATE
    wanted = union.any(0)
    best = _highest(np.where(wanted, scores, NO_GATE), int(wanted.sum(1).max()))
    return best, union[:, rows, best]


def _highest(scores: Floats, k: int) -> Ints:
    """[A, min(k, C)] the places of each row's highest scores, best first, the first of equals."""
    return (-scores).argsort(axis=1, kind="stable")[:, :k]


def _forest(levels: list[_Level], stop_depth: Ints, layout: Layout) -> Forest:
    sizes = [level.tokens.shape[1] for level in levels]
    return Forest(
        tokens=layout.tensor(np.concatenate([level.tokens for level in levels], axis=1)),
        parents=layout.tensor(np.concatenate([level.parents for level in levels], axis=1)),
        depths=layout.tensor(np.arange(len(levels)).repeat(sizes)),
        scores=layout.tensor(np.concatenate([level.scores for level in levels], axis=1)),
        stop_depth=layout.tensor(stop_depth),
    )
