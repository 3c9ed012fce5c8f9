"""Specifies the device-side decisions in plain torch and Python, on any device.

Written to be read, not to be fast: it loops and reads values back. `echo_kernels.device_ops`
documents the operations and checks the arguments before they arrive here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from echo_kernels import reference
from echo_kernels.device_interface import Candidates, DrawKeys, Level, TreeRows, Walk

NOTHING = float("-inf")


def verify_tree(logits: Tensor, rows: TreeRows, keys: DrawKeys, max_depth: int) -> Walk:
    drawn, finite = (t.tolist() for t in draw_rows(logits, rows, keys))
    parents, tokens, starts = rows.parents.tolist(), rows.tokens.tolist(), rows.starts.tolist()
    batch = len(starts) - 1
    out_tokens = torch.full((batch, max_depth + 1), -1, dtype=torch.int64)
    accepted = torch.full((batch, max_depth), -1, dtype=torch.int32)
    lengths, failed = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.bool)
    for b, (root, end) in enumerate(pairwise(starts)):
        row: int | None = root
        while row is not None:
            if not finite[row]:
                failed[b] = True
                break
            depth = int(lengths[b])
            out_tokens[b, depth] = drawn[row]
            children = [r for r in range(row + 1, end) if parents[r] == row and tokens[r] == drawn[row]]
            row = children[-1] if children and depth < max_depth else None
            if row is not None:
                accepted[b, depth] = row - root - 1
                lengths[b] += 1
    device = logits.device
    return Walk(out_tokens.to(device), accepted.to(device), lengths.to(device), failed.to(device))


def draw_rows(logits: Tensor, rows: TreeRows, keys: DrawKeys) -> tuple[Tensor, Tensor]:
    """The token that belongs after each row [N] int64, and whether its logits have a finite maximum [N] bool."""
    x = logits.float()
    peak, plain = x.max(dim=1)  # max propagates NaN; the first of equal maxima
    owner = rows.owner.clamp(min=0).long()
    temperature = keys.temperatures[owner]
    noise = reference.gumbel(keys.seeds[owner], keys.positions[owner] + rows.depths, x.shape[1], x.device)
    noisy = (x / temperature.where(temperature > 0, 1.0)[:, None] + noise).argmax(dim=1)
    return noisy.where(temperature > 0, plain), peak.isfinite()


def gate_topk(
    logits: Tensor,
    front_scores: Tensor,
    front_nodes: Tensor,
    alive: Tensor,
    thresholds: Tensor,
    vocabulary: Tensor | None,
    fan: int,
    width: int,
) -> Level:
    batch, front = front_scores.shape
    log_probs, tokens = reference.top_tokens(logits, fan)
    scores = (
        (front_scores[:, :, None] + log_probs.view(batch, front, fan)).where(alive[:, None, None], NOTHING).flatten(1)
    )
    if vocabulary is not None:
        tokens = vocabulary[tokens]
    there = scores > NOTHING
    best_scores, best = (t[:, :width] for t in scores.sort(dim=1, descending=True, stable=True))
    return Level(
        tokens=tokens.reshape(batch, -1).where(there, 0),
        scores=scores,
        parents=front_nodes.repeat_interleave(fan, dim=1).where(there, 0),
        best=best.where(best_scores > NOTHING, 0),
        best_scores=best_scores.contiguous(),
        alive=alive & (best_scores[:, 0].exp() >= thresholds),
    )


def pack_top(candidates: Candidates, roots: Tensor, budget: Tensor, capacity: int, limit: int, levels: int) -> TreeRows:
    picked = top_mask(candidates, min(int(budget), capacity), limit)
    return pack_mask(candidates, roots, picked, capacity, limit, levels)


def top_mask(candidates: Candidates, k: int, limit: int) -> Tensor:
    """[B, M] bool: the k likeliest nodes of the batch, at most `limit` a request; ties by (node, request)."""
    scores = _valid(candidates)
    batch, width = scores.shape
    rank = torch.empty_like(candidates.parents)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank.scatter_(1, order, torch.arange(width, device=rank.device).expand(batch, -1).contiguous())
    scores = scores.where(rank < limit, NOTHING)
    flat = scores.t().reshape(-1)  # node by node, so that a stable sort breaks ties by (node, request)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: max(k, 0)]] = True
    return (chosen & (flat > NOTHING)).view(width, batch).t().contiguous()


def _valid(candidates: Candidates) -> Tensor:
    """The scores with -inf for every node that is NaN or lies below a node that does not exist."""
    exists = candidates.scores > NOTHING
    for node in range(exists.shape[1]):  # parents come first
        parent = candidates.parents[:, node]
        above = exists.gather(1, parent.clamp(min=0)[:, None]).squeeze(1)
        exists[:, node] &= (parent < 0) | above
    return candidates.scores.where(exists, NOTHING)


def pack_mask(
    candidates: Candidates, roots: Tensor, picked: Tensor, capacity: int, limit: int, levels: int
) -> TreeRows:
    del levels  # the parents say as much
    batch, device = picked.shape[0], picked.device
    rows = capacity + batch
    tokens, parents = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), -1, dtype=torch.int32)
    depths, owner = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), -1, dtype=torch.int32)
    mask = torch.zeros(rows, limit + 1, dtype=torch.bool)
    starts = [0]
    for b in range(batch):
        root = starts[-1]
        nodes = picked[b].nonzero().squeeze(1).tolist()[: min(limit, capacity + b - root)]
        place = {-1: root} | {node: root + 1 + i for i, node in enumerate(nodes)}
        tokens[root], parents[root], owner[root], mask[root, 0] = roots[b], root, b, True
        for node, row in list(place.items())[1:]:
            above = place[int(candidates.parents[b, node])]
            tokens[row], parents[row], owner[row] = candidates.tokens[b, node], above, b
            depths[row] = candidates.depths[node] + 1
            mask[row] = mask[above]
            mask[row, row - root] = True
        starts.append(root + len(place))
    start = torch.tensor(starts, dtype=torch.int32)
    return TreeRows(*(t.to(device) for t in (tokens, parents, depths, owner, mask, start)))
