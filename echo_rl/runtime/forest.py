"""Tree growth: the drafter proposes level by level for the whole batch, gates stop hopeless requests.

Each level expands the `width` best candidates of the level before and pools all their children
(EAGLE-2's dynamic tree). Requests that a gate stopped keep the candidates they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def grow(
    drafter: Drafter, cache: KVCache, layout: Layout, roots: torch.Tensor, plan: SpecPlan, extend: Extend
) -> Forest:
    """`roots` [B, hidden] are the drafter's states at each request's last committed pair."""
    batch = len(roots)
    log_probs, tokens = drafter.top(roots, plan.width)
    levels = [_Level(tokens, log_probs, torch.full_like(tokens, -1))]
    alive = torch.ones(batch, dtype=torch.bool, device=roots.device)
    stop_depth = torch.zeros(batch, dtype=torch.int64, device=roots.device)
    front = _Expansion(
        requests=torch.arange(batch, device=roots.device),
        nodes=torch.arange(tokens.shape[1], device=roots.device).expand(batch, -1),
        tokens=tokens,
        scores=log_probs,
        features=roots[:, None].expand(-1, tokens.shape[1], -1),
        mask=torch.zeros(batch, tokens.shape[1], 0, dtype=torch.bool, device=roots.device),
    )
    first_node = tokens.shape[1]
    for depth in range(1, plan.max_depth):
        front, alive = _gate(front, alive, levels[-1], depth - 1, plan, extend)
        if not len(front.requests):
            break
        hidden, mask = _run(drafter, cache, layout, front)
        level, front = _branch(drafter, front, hidden, mask, plan.width, batch, first_node)
        levels.append(level)
        stop_depth[front.requests] = depth
        first_node += level.tokens.shape[1]
    return _forest(levels, stop_depth)


def _gate(
    front: _Expansion, alive: torch.Tensor, level: _Level, depth: int, plan: SpecPlan, extend: Extend
) -> tuple[_Expansion, torch.Tensor]:
    """Ask the controller at a gated depth; drop the requests it stops from the expansion."""
    if plan.gate(depth) is None:
        return front, alive
    alive = alive & extend(Frontier(depth, level.scores, alive), plan)
    keep = alive[front.requests]
    parts = (front.requests, front.nodes, front.tokens, front.scores, front.features, front.mask)
    return _Expansion(*(part[keep] for part in parts)), alive


def _run(drafter: Drafter, cache: KVCache, layout: Layout, front: _Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafter over the expansion: hidden [A, F, hidden] and the mask including the rows themselves [A, F, E + F]."""
    alive, width = front.tokens.shape
    before = front.mask.shape[2]
    itself = torch.eye(width, dtype=torch.bool, device=front.mask.device).expand(alive, -1, -1)
    mask = torch.cat([front.mask, itself], dim=2)
    context = layout.kv_lens[front.requests]  # [A]
    logical = context[:, None] + torch.arange(before, before + width, device=context.device)
    owner = front.requests[:, None].expand(-1, width)
    depth = mask.sum(dim=2) - 1  # ancestors in the tree
    rows = torch.full_like(context, width)
    view = layout.view(
        layout.slots(owner.reshape(-1), logical.reshape(-1)), rows, context, rows + before,
        mask.reshape(alive * width, -1), front.requests,
    )  # fmt: skip
    hidden = drafter.forward(
        front.tokens.reshape(-1), front.features.reshape(alive * width, -1).contiguous(),
        (context[:, None] + depth).reshape(-1), cache, view,
    )  # fmt: skip
    return hidden.view(alive, width, -1), mask


def _branch(
    drafter: Drafter,
    front: _Expansion,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    width: int,
    batch: int,
    first_node: int,
) -> tuple[_Level, _Expansion]:
    """Children of the expanded nodes, and the best `width` of them as the next expansion."""
    alive, expanded = front.tokens.shape
    log_probs, tokens = drafter.top(hidden.reshape(alive * expanded, -1), width)
    fan = tokens.shape[1]
    scores = (front.scores[:, :, None] + log_probs.view(alive, expanded, fan)).reshape(alive, -1)
    tokens = tokens.reshape(alive, -1)
    parents = front.nodes.repeat_interleave(fan, dim=1)
    best_scores, best = scores.topk(min(width, scores.shape[1]), dim=1)
    parent_row = best // fan
    rows = torch.arange(alive, device=best.device)[:, None]
    following = _Expansion(
        front.requests, first_node + best, tokens.gather(1, best), best_scores, hidden[rows, parent_row],
        mask[rows, parent_row],
    )  # fmt: skip
    if alive == batch:
        return _Level(tokens, scores, parents), following
    full = tokens.new_zeros(batch, tokens.shape[1])
    return _Level(
        full.index_copy(0, front.requests, tokens),
        scores.new_full((batch, scores.shape[1]), NO_GATE).index_copy(0, front.requests, scores),
        full.index_copy(0, front.requests, parents),
    ), following


def _forest(levels: list[_Level], stop_depth: torch.Tensor) -> Forest:
    depths = [torch.full((level.tokens.shape[1],), d, dtype=torch.int64) for d, level in enumerate(levels)]
    return Forest(
        tokens=torch.cat([level.tokens for level in levels], dim=1),
        parents=torch.cat([level.parents for level in levels], dim=1),
        depths=torch.cat(depths).to(stop_depth.device),
        scores=torch.cat([level.scores for level in levels], dim=1),
        stop_depth=stop_depth,
    )
