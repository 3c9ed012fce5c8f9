"""What every controller shares: the default rules and the pure functions that pick nodes of a forest.

Picking is a few whole-batch tensor operations; nothing here loops over requests or nodes. Knows
nothing about drafters, models or time.

Shapes: B requests, M forest nodes a request (padded), K picked nodes in all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, NO_GATE, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport

MISSING = -1e30
"""Below every log-probability, above float32's lowest."""


class BaseController(ABC):
    """The defaults of `Controller`; a rule overrides only what it changes.

    A subclass states its knobs in `propose`. `plan` then holds them to what the load admits (no
    requests: no speculation; never more than `max_nodes` a request) and remembers that cap for
    `select`, which has no view of the load.
    """

    name: str = ""

    def __init__(self) -> None:
        self._node_cap: int | None = None

    @abstractmethod
    def propose(self, load: LoadView) -> SpecPlan:
        """The knobs of the coming step, for a batch of at least one request."""

    def plan(self, load: LoadView) -> SpecPlan:
        self._node_cap = load.max_nodes
        if load.batch_size < 1 or load.max_nodes < 1:
            return AUTOREGRESSIVE
        plan = self.propose(load)
        most = load.batch_size * load.max_nodes
        return plan if plan.budget <= most else replace(plan, budget=most)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose best path is at least as likely as the plan's gate at this depth."""
        gate = plan.gate(frontier.depth)
        return frontier.alive if gate is None else frontier.alive & (frontier.confidence >= gate)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        return pack(forest, global_top_k(forest, plan.budget, self._node_cap))

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """The power of path probabilities at each depth, the last holding beyond (() for 1 everywhere), by which a
        backend may gate and select in this rule's place; None where the rule must be asked."""
        return () if self._decides_as(BaseController) and not plan.floor else None

    def _decides_as(self, rule: Any) -> bool:
        """Whether gates and selection are still those of that class."""
        own = type(self)
        return own.extend is rule.extend and own.select is rule.select

    def observe(self, report: StepReport) -> None:
        del report  # a fixed rule learns nothing


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
