"""Tree growth: the drafter proposes level by level for the whole batch, gates stop hopeless requests.

Each level expands the `width` best candidates of the level before and pools all their children
(EAGLE-2's dynamic tree). Requests that a gate stopped keep the candidates they have. A *nested*
forest expands the union of what every width up to the plan's would have expanded, so that each
narrower forest is a part of it: a recording needs one pass for all widths.
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
    beams: torch.Tensor  # [W, A, F] bool, whose beam the node is in: of the plan's width, or of each width up to it


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
        beams=_first_beams(batch, tokens.shape[1], plan),
    )
    first_node = tokens.shape[1]
    for depth in range(1, plan.max_depth):
        front, alive = _gate(front, alive, levels[-1], depth - 1, plan, extend)
        if not len(front.requests):
            break
        hidden, mask = _run(drafter, cache, layout, front)
        level, front = _branch(drafter, front, hidden, mask, plan, batch, first_node)
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
    plan: SpecPlan,
    batch: int,
    first_node: int,
) -> tuple[_Level, _Expansion]:
    """Children of the expanded nodes, and the best of them as the next expansion."""
    alive, expanded = front.tokens.shape
    log_probs, tokens = drafter.top(hidden.reshape(alive * expanded, -1), plan.width)
    fan = tokens.shape[1]
    scores = (front.scores[:, :, None] + log_probs.view(alive, expanded, fan)).reshape(alive, -1)
    tokens = tokens.reshape(alive, -1)
    parents = front.nodes.repeat_interleave(fan, dim=1)
    best_scores, best, beams = _best(scores, front.beams, fan, plan)
    parent_row = best // fan
    rows = torch.arange(alive, device=best.device)[:, None]
    following = _Expansion(
        front.requests, first_node + best, tokens.gather(1, best), best_scores, hidden[rows, parent_row],
        mask[rows, parent_row], beams,
    )  # fmt: skip
    if alive == batch:
        return _Level(tokens, scores, parents), following
    full = tokens.new_zeros(batch, tokens.shape[1])
    return _Level(
        full.index_copy(0, front.requests, tokens),
        scores.new_full((batch, scores.shape[1]), NO_GATE).index_copy(0, front.requests, scores),
        full.index_copy(0, front.requests, parents),
    ), following


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


def _forest(levels: list[_Level], stop_depth: torch.Tensor) -> Forest:
    depths = [torch.full((level.tokens.shape[1],), d, dtype=torch.int64) for d, level in enumerate(levels)]
    return Forest(
        tokens=torch.cat([level.tokens for level in levels], dim=1),
        parents=torch.cat([level.parents for level in levels], dim=1),
        depths=torch.cat(depths).to(stop_depth.device),
        scores=torch.cat([level.scores for level in levels], dim=1),
        stop_depth=stop_depth,
    )
