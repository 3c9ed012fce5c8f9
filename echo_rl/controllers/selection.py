"""Selects the nodes of a forest that are verified: pure functions that pick them, and `pack`, which lists them.

Each pick is a few whole-batch operations; nothing here loops over requests or nodes. Knows nothing about
drafters, models or time. `likeliest` is what most rules ask for; where the forest lies in the host's memory it
is done by a few numpy calls on flat arrays, since a step asks once, with cold caches, so that every further
function costs more than the work it does.

Shapes: B requests, M forest nodes a request (padded), K picked nodes in all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_rl.contracts import NO_GATE, Forest, Frontier, Selection, least_score

MISSING = -1e30
"""Below every log-probability, above float32's lowest."""
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FEW = 256
"""Scores that are read one by one, and partitioned as they are. Of more, those that do not exist are left out first:
partitioning crawls over equal values."""


def passing(frontier: Frontier, gate: float) -> Tensor:
    """[B] bool: the requests that drafted this level and whose best path is at least as likely as the gate."""
    scores, alive = frontier.scores, frontier.alive
    least = least_score(gate) if gate > 0.0 else NO_GATE
    if scores.is_cpu and scores.numel() <= FEW:
        passed = [max(row) >= least and not math.isnan(sum(row)) for row in scores.tolist()]
        if all(passed):
            return alive
        return torch.from_numpy(np.array([a and b for a, b in zip(alive.tolist(), passed, strict=True)]))
    return alive & (scores.amax(dim=1) >= least)


def likeliest(
    forest: Forest, k: int, limit: int | None = None, powers: Floats | None = None, floor: float = 0.0
) -> Selection:
    """The k likeliest nodes of the batch, at most `limit` of one request, none below `floor`.

    `powers` are those of path probabilities by depth, the last for all that are deeper (None: 1 everywhere).
    """
    if forest.scores.is_cpu and k > 0:
        picked = _on_host(forest, k, limit, powers, floor)
        if picked is not None:
            return picked
    return pack(forest, global_top_k(scaled(forest, powers, floor), k, limit))


def scaled(forest: Forest, powers: Floats | None, floor: float = 0.0) -> Forest:
    """The forest with path probabilities raised to the power of their depth, and only those of at least `floor`."""
    scores = forest.scores
    if powers is not None:
        scores = scores * torch.from_numpy(powers).to(scores.device)[forest.depths.clamp(max=len(powers) - 1)]
    if floor:
        scores = scores.masked_fill(scores < math.log(floor), NO_GATE)
    return replace(forest, scores=scores)


def global_top_k(forest: Forest, k: int, limit: int | None = None) -> Tensor:
    """[B, M] bool: the k most likely nodes of the whole batch, at most `limit` of one request.

    Ties go to the lower node index, then to the lower request, so a parent always comes before its
    child and the pick is closed under ancestors. Never more than k nodes; nodes that do not exist
    (score -inf or NaN, or below such a node) are never picked.
    """
    scores = _valid_scores(forest)
    if limit is not None and limit * scores.shape[0] <= k:
        return _row_top_k(scores, torch.full_like(forest.stop_depth, limit))
    mask = _top_k(scores, k)
    if limit is not None and limit < min(k, scores.shape[1]) and int(mask.sum(1).amax()) > limit:
        fits = _row_top_k(scores, torch.full_like(forest.stop_depth, limit))
        mask = _top_k(scores.masked_fill(~fits, NO_GATE), k)
    return mask


def per_request_top_k(forest: Forest, k: int | Tensor) -> Tensor:
    """[B, M] bool: each request's own k most likely nodes; k is one number or [B] int64.

    Ties go to the lower node index, which keeps the pick closed under ancestors.
    """
    counts = k if isinstance(k, Tensor) else torch.full_like(forest.stop_depth, k)
    return _row_top_k(_valid_scores(forest), counts)


def even_split(budget: int, batch: int, device: torch.device | None = None) -> Tensor:
    """[B] int64: shares of a budget that differ by at most one, larger ones first."""
    return budget // batch + (torch.arange(batch, device=device) < budget % batch).long()


def pack(forest: Forest, mask: Tensor) -> Selection:
    """The picked nodes request by request, parents re-indexed among their own request's picks.

    `mask` ([B, M] bool) must be closed under ancestors.
    """
    batch, width = mask.shape
    flat = mask.reshape(-1).nonzero().squeeze(1)  # [K] ascending: request by request, parents first
    row = flat // width
    node = flat - row * width
    counts = torch.bincount(row, minlength=batch)
    start = (counts.cumsum(0) - counts)[row]
    slot = flat.new_full((batch * width,), -2)  # forest node -> place among its request's picks
    slot[flat] = torch.arange(flat.shape[0], device=flat.device) - start
    parent = forest.parents.reshape(-1)[flat]
    parents = torch.where(parent < 0, -1, slot[(parent + row * width).clamp_(min=0)])
    assert parents.numel() == 0 or int(parents.amin()) >= -1, "the mask is not closed under ancestors"
    return Selection(counts, forest.tokens.reshape(-1)[flat], parents, forest.depths[node])


def _valid_scores(forest: Forest) -> Tensor:
    """The forest's scores with -inf for every node that is NaN or lies below a node that does not exist."""
    scores = forest.scores
    if not bool(scores.sum().isnan()):  # the sum of finite numbers and -inf is NaN only if one of them is
        return scores
    exists = scores > NO_GATE
    is_root_child, parents = forest.parents < 0, forest.parents.clamp(min=0)
    for _ in range(int(forest.depths.amax()) + 1):
        exists = exists & (is_root_child | exists.gather(1, parents))
    return scores.masked_fill(~exists, NO_GATE)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """[B, M] bool mask of the k highest finite scores, ties by (column, row)."""
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= scores.numel():
        return scores > NO_GATE
    threshold = _kth_highest(scores.reshape(-1), k)
    if threshold == NO_GATE:
        return scores > NO_GATE
    mask = scores >= threshold
    if int(mask.sum()) == k:
        return mask
    above, tied = scores > threshold, (scores == threshold).t()  # [M, B]: earlier levels first
    place = tied.reshape(-1).cumsum(0).view(tied.shape)
    return above | (tied & (place <= k - above.sum())).t()


def _row_top_k(scores: Tensor, counts: Tensor) -> Tensor:
    """[B, M] bool mask of each row's `counts[b]` highest finite scores, ties by column."""
    most = min(int(counts.amax()), scores.shape[1]) if counts.numel() else 0
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    counts = counts.clamp(max=most).unsqueeze(1)  # [B, 1]
    threshold = _kth_highest_by_row(scores, counts.clamp(min=1)).masked_fill_(counts <= 0, float("inf"))
    mask = (scores >= threshold) & (scores > NO_GATE)
    if not bool((mask.sum(1, keepdim=True) > counts).any()):
        return mask
    above, tied = scores > threshold, scores == threshold
    place = tied.cumsum(1)
    return (above | (tied & (place <= counts - above.sum(1, keepdim=True)))) & (scores > NO_GATE)


def _kth_highest(values: Tensor, k: int) -> float:
    """The k-th highest of a flat tensor, -inf where fewer than k are finite."""
    if values.device.type != "cpu":
        return float(values.topk(k, sorted=False).values.amin())
    place = values.shape[0] - k
    copy = _distinct(values).numpy()  # one-pass selection: much faster than topk for large k
    copy.partition(place)
    return float(copy[place]) if copy[place] > MISSING else NO_GATE


def _kth_highest_by_row(scores: Tensor, k: Tensor) -> Tensor:
    """[B, 1] the k-th highest of each row, -inf where fewer are finite; k is [B, 1], at least 1."""
    if scores.device.type != "cpu":
        return scores.topk(int(k.amax()), dim=1).values.gather(1, k - 1)
    place = scores.shape[1] - k
    copy = _distinct(scores)
    copy.numpy().partition(sorted(set(place.flatten().tolist())), axis=1)
    found = copy.gather(1, place)
    return found.masked_fill_(found <= MISSING, NO_GATE)


def _distinct(scores: Tensor) -> Tensor:
    """A copy with each -inf replaced by a number of its own below `MISSING`: selection crawls over equal values."""
    fillers = torch.linspace(2.0 * MISSING, MISSING, scores.numel(), dtype=torch.float32).view(scores.shape)
    return torch.where(scores > NO_GATE, scores.float(), fillers)


def _on_host(forest: Forest, k: int, limit: int | None, powers: Floats | None, floor: float) -> Selection | None:
    """None where the pick takes more than a threshold: a score that is NaN, a request past its limit."""
    scores, depths = forest.scores.numpy(), forest.depths.numpy()
    batch, width = scores.shape
    if powers is not None:
        scores = scores * powers.take(depths, mode="clip")
    if batch == 1 and limit is not None:
        k = min(k, limit)
    nodes = _top(scores.reshape(-1), k, width, least_score(floor))
    if nodes is None:
        return None
    parents = forest.parents.numpy().reshape(-1).take(nodes)
    if batch == 1:
        counts, start, places = np.array((len(nodes),)), 0, nodes
    else:
        row = nodes // width
        counts = np.bincount(row, minlength=batch)
        if limit is not None and limit < width and max(counts.tolist()) > limit:
            return None
        start, first = (counts.cumsum() - counts)[row], row * width
        parents, places = parents + first, nodes - first
    # A node's parent is picked too, and the root's place is before the request's first node.
    above = nodes.searchsorted(parents, side="right") - (start + 1)
    packed = (counts, forest.tokens.numpy().reshape(-1).take(nodes), above, depths.take(places))
    return Selection(*map(torch.from_numpy, packed))


def _top(scores: Floats, k: int, width: int, least: float) -> Ints | None:
    """[K] ascending: the k highest of the flat scores that are at least `least`; None if one is NaN."""
    open_to: Ints | None = None
    values = scores
    if len(scores) <= k or len(scores) > FEW:
        open_to = (scores >= least).nonzero()[0]
        if len(open_to) < len(scores) and math.isnan(scores[scores.argmax()]):
            return None
        if len(open_to) <= k:
            return open_to
        values = scores[open_to]
    rest = len(values) - k
    order = values.argpartition((rest - 1, rest, len(values) - 1))
    next_one, last, first = (float(values[order[place]]) for place in (rest - 1, rest, -1))
    if math.isnan(first):
        return None
    if last < least:
        few: Ints = (scores >= least).nonzero()[0]
        return few
    if next_one == last:
        return _among_equals(scores, k, width, last)
    nodes: Ints = order[rest:] if open_to is None else open_to[order[rest:]]
    nodes.sort()
    return nodes


def _among_equals(scores: Floats, k: int, width: int, last: float) -> Ints:
    """[k] ascending: all scores above the last, and of those that equal it the first levels', request by request."""
    above, equal = (scores > last).nonzero()[0], (scores == last).nonzero()[0]
    if len(scores) > width:
        equal = equal[np.lexsort((equal, equal % width))]
    nodes: Ints = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    return nodes
