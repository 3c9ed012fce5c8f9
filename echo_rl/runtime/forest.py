"""Tree growth: the drafter proposes level by level for the whole batch, gates stop hopeless requests.

Each level expands the `width` best candidates of the level before and pools all their children
(EAGLE-2's dynamic tree). Requests that a gate stopped keep the candidates they have. A *nested*
forest expands the union of what every width up to the plan's would have expanded, so that each
narrower forest is a part of it: a recording needs one pass for all widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from echo_rl.contracts import NO_GATE, Forest, Frontier, SpecPlan
from echo_rl.runtime.drafter import Drafter
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.layout import Layout

Extend = Callable[[Frontier, SpecPlan], torch.Tensor]


@dataclass(frozen=True)
class _Level:
    """Candidates of one level, all requests (B), C a request; -inf where a request didn't draft."""

    tokens: torch.Tensor  # [B, C]
    scores: torch.Tensor  # [B, C]
    parents: torch.Tensor  # [B, C] node index in the row


@dataclass(frozen=True)
class _Expansion:
    """The nodes that the drafter runs on next: F for each of A requests still alive."""

    requests: torch.Tensor  # [A]
    nodes: torch.Tensor  # [A, F] node index in the row
    tokens: torch.Tensor  # [A, F]
    scores: torch.Tensor  # [A, F]
    features: torch.Tensor  # [A, F, hidden], the parents' hidden states
    mask: torch.Tensor  # [A, F, E], expanded ancestors so far
    beams: torch.Tensor  # [W, A, F] bool, whose beam the node is in: of the plan's width, or of each width up to it


def grow(
    drafter: Drafter, cache: KVCache, layout: Layout, roots: torch.Tensor, plan: SpecPlan, extend: Extend
) -> Forest:
    """`roots` [B, hidden] are the drafter's states at each request's last committed pair."""
    batch, device = len(roots), roots.device
    log_probs, tokens = drafter.top(roots, plan.width)
    levels = [_Level(tokens, log_probs, torch.full_like(tokens, -1))]
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    stop_depth = np.zeros(batch, dtype=np.int64)
    front, first_node = _first(roots, levels[0], plan), tokens.shape[1]
    for depth in range(1, plan.max_depth):
        front, alive = _gate(front, alive, levels[-1], depth - 1, plan, extend)
        if not len(front.requests):
            break
        requests = front.requests.cpu().numpy()
        stop_depth[requests] = depth
        hidden, mask = _run(drafter, cache, layout, front, requests, depth)
        if depth + 1 == plan.max_depth:
            levels.append(_of_all(_children(drafter, front, hidden, plan), front.requests, batch))
            break
        level, front = _branch(drafter, front, hidden, mask, plan, batch, first_node)
        levels.append(level)
        first_node += level.tokens.shape[1]
    return _forest(levels, stop_depth, layout)


def _first(roots: torch.Tensor, level: _Level, plan: SpecPlan) -> _Expansion:
    """All of the root's children are expanded."""
    batch, width = level.tokens.shape
    return _Expansion(
        requests=torch.arange(batch, device=roots.device),
        nodes=torch.arange(width, device=roots.device).expand(batch, -1),
        tokens=level.tokens,
        scores=level.scores,
        features=roots[:, None].expand(-1, width, -1),
        mask=torch.zeros(batch, width, 0, dtype=torch.bool, device=roots.device),
        beams=_first_beams(batch, width, plan),
    )


def _gate(
    front: _Expansion, alive: torch.Tensor, level: _Level, depth: int, plan: SpecPlan, extend: Extend
) -> tuple[_Expansion, torch.Tensor]:
    """Ask the controller at a gated depth; drop the requests it stops from the expansion."""
    if plan.gate(depth) is None:
        return front, alive
    still = alive & extend(Frontier(depth, level.scores, alive), plan)
    if torch.equal(still, alive):  # the common case: a gate that stops nobody costs next to nothing
        return front, alive
    alive = still
    keep = alive[front.requests]
    kept = _Expansion(
        front.requests[keep], front.nodes[keep], front.tokens[keep], front.scores[keep], front.features[keep],
        front.mask[keep], front.beams[:, keep],
    )  # fmt: skip
    return kept, alive


def _run(
    drafter: Drafter, cache: KVCache, layout: Layout, front: _Expansion, requests: np.ndarray, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafter over the expansion: hidden [A, F, hidden] and the mask including the rows themselves [A, F, E + F].

    `requests` [A] are the expansion's, on the host; its nodes have `depth` - 1 ancestors in the tree.
    """
    alive, width = front.tokens.shape
    before = front.mask.shape[2]
    mask = torch.cat([front.mask, _identity(width, front.mask.device).expand(alive, -1, -1)], dim=2)
    context = layout.host_kv_lens[requests]  # [A]
    slots = layout.host_slots(requests[:, None], context[:, None] + np.arange(before, before + width))
    starts = np.arange(0, alive * width + 1, width, dtype=np.int32)
    view = layout.host_view(slots.reshape(-1), starts, context, before + width, mask.view(alive * width, -1), requests)
    hidden = drafter.forward(
        front.tokens.reshape(-1), front.features.reshape(alive * width, -1).contiguous(),
        layout.tensor((context + (depth - 1)).repeat(width)), cache, view,
    )  # fmt: skip
    return hidden.view(alive, width, -1), mask


def _branch(
    drafter: Drafter,
    front: _Expansion,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    plan: SpecPlan,
    batch: int,
    first_node: int,
) -> tuple[_Level, _Expansion]:
    """Children of the expanded nodes, and the best of them as the next expansion."""
    level = _children(drafter, front, hidden, plan)
    alive, expanded = front.tokens.shape
    fan = level.tokens.shape[1] // expanded
    best_scores, best, beams = _best(level.scores, front.beams, fan, plan)
    parents = (best // fan + _row_starts(alive, expanded, best.device)).view(-1)  # rows of the expansion
    following = _Expansion(
        front.requests, first_node + best, level.tokens.gather(1, best), best_scores,
        hidden.view(alive * expanded, -1).index_select(0, parents).view(*best.shape, -1),
        mask.view(alive * expanded, -1).index_select(0, parents).view(*best.shape, -1), beams,
    )  # fmt: skip
    return _of_all(level, front.requests, batch), following


def _children(drafter: Drafter, front: _Expansion, hidden: torch.Tensor, plan: SpecPlan) -> _Level:
    """The children of the expanded nodes of the A requests still alive."""
    alive, expanded = front.tokens.shape
    log_probs, tokens = drafter.top(hidden.reshape(alive * expanded, -1), plan.width)
    fan = tokens.shape[1]
    scores = front.scores[:, :, None] + log_probs.view(alive, expanded, fan)
    parents = front.nodes[:, :, None].expand(-1, -1, fan)
    return _Level(tokens.view(alive, -1), scores.view(alive, -1), parents.reshape(alive, -1))


def _of_all(level: _Level, requests: torch.Tensor, batch: int) -> _Level:
    """A level of the A requests still alive as one of all B."""
    if len(requests) == batch:
        return level
    full = level.tokens.new_zeros(batch, level.tokens.shape[1])
    return _Level(
        full.index_copy(0, requests, level.tokens),
        level.scores.new_full(full.shape, NO_GATE).index_copy(0, requests, level.scores),
        full.index_copy(0, requests, level.parents),
    )


@lru_cache(maxsize=64)
def _identity(size: int, device: torch.device) -> torch.Tensor:
    """[size, size] bool. Shared by all callers: to be read only, as `_row_starts`."""
    return torch.eye(size, dtype=torch.bool, device=device)


@lru_cache(maxsize=256)
def _row_starts(rows: int, width: int, device: torch.device) -> torch.Tensor:
    """[rows, 1] the place of each row's first element in a flat [rows, width]."""
    return torch.arange(0, rows * width, width, device=device)[:, None]


def _first_beams(batch: int, width: int, plan: SpecPlan) -> torch.Tensor:
    """[W, B, width]: the root's first w children are the first beam of width w."""
    if not plan.nested:
        return torch.ones(1, batch, width, dtype=torch.bool)
    places = torch.arange(width)
    return (places < torch.arange(1, plan.width + 1)[:, None])[:, None].expand(-1, batch, -1)


def _best(
    scores: torch.Tensor, beams: torch.Tensor, fan: int, plan: SpecPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The candidates to expand next: their scores and places in `scores` [A, F * fan], and the beams they are in."""
    if not plan.nested:
        best_scores, best = scores.topk(min(plan.width, scores.shape[1]), dim=1)
        return best_scores, best, beams[:, :, :1].expand(-1, -1, best.shape[1])
    rank = torch.arange(scores.shape[1], device=scores.device) % fan
    inside = []
    for width, beam in enumerate(beams.to(scores.device), 1):
        open_to = beam.repeat_interleave(fan, dim=1) & (rank < width)  # [A, F * fan]
        top = scores.masked_fill(~open_to, NO_GATE).topk(min(width, scores.shape[1]), dim=1)
        inside.append(torch.zeros_like(open_to).scatter_(1, top.indices, top.values > NO_GATE))
    union = torch.stack(inside)  # [W, A, F * fan]
    wanted = union.any(0)
    best = scores.masked_fill(~wanted, NO_GATE).topk(int(wanted.sum(1).amax()), dim=1).indices
    return scores.gather(1, best), best, union.gather(2, best.expand(len(union), -1, -1))


def _forest(levels: list[_Level], stop_depth: np.ndarray, layout: Layout) -> Forest:
    sizes = [level.tokens.shape[1] for level in levels]
    return Forest(
        tokens=torch.cat([level.tokens for level in levels], dim=1),
        parents=torch.cat([level.parents for level in levels], dim=1),
        depths=layout.tensor(np.arange(len(levels)).repeat(sizes)),
        scores=torch.cat([level.scores for level in levels], dim=1),
        stop_depth=layout.tensor(stop_depth),
    )
