"""Grows and selects trees without the host: a stopped request keeps its rows, which then propose nothing.

The same trees as `echo_rl.runtime.drafters.growing.grow` makes and a `FollowsPlan` controller selects from.
Shapes: B requests, F expanded nodes a request, D levels, C the bucket's capacity in nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from echo_kernels.device_interface import Candidates, Level, TreeRows
from echo_kernels.device_ops import DeviceOps
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.step.device.buckets import Bucket
from echo_rl.runtime.step.device.inputs import Given, Pairs

ABSORB_ROWS = 1024
"""Committed pairs that the drafter reads in one pass."""
NOTHING = float("-inf")


@dataclass(frozen=True)
class DeviceDraftStats:
    """The drafter's work in numbers, still on the device."""

    drafted: Tensor  # [1] int32 nodes proposed
    drafting: Tensor  # [D] int32 requests that drafted each depth
    levels: Tensor  # [B] int32 levels that each request drafted
    confidence: Tensor  # [B] float32 probability of the likeliest first token


@dataclass(frozen=True)
class Front:
    """The nodes that the drafter runs on next."""

    nodes: Tensor  # [B, F] int64 index in the request's forest
    tokens: Tensor  # [B, F] int64
    scores: Tensor  # [B, F] float32
    features: Tensor  # [B, F, hidden] the parents' hidden states
    mask: Tensor  # [B, F, E] expanded ancestors so far


class DeviceDrafter:
    """The drafter, its cache and the decisions, bound once."""

    def __init__(self, drafter: Drafter, cache: KVCache, spare: int, decisions: DeviceOps, max_nodes: int) -> None:
        self._drafter, self._cache, self._spare = drafter, cache, spare
        self._decisions, self._max_nodes = decisions, max_nodes

    def absorb(self, pairs: Pairs) -> None:
        """Let the drafter catch up, all but each request's last pair (which `run` reads)."""
        parts = (t.split(ABSORB_ROWS) for t in (pairs.tokens, pairs.positions, pairs.slots))
        for tokens, positions, slots in zip(*parts, strict=True):
            if len(tokens):
                features = self._drafter.project(self._cache.features[slots])
                self._drafter.absorb(tokens, features, positions, self._cache, slots)

    def run(self, given: Given, bucket: Bucket) -> tuple[TreeRows, DeviceDraftStats]:
        """Grow the forest and lay out the nodes to verify."""
        state = self._roots(given)[:, None]  # [B, F, hidden]
        batch = bucket.requests
        scores = torch.zeros(batch, 1, device=state.device)
        nodes = torch.full_like(scores, -1, dtype=torch.int64)
        level = self._level(state, scores, nodes, given.drafting, given.thresholds[0], bucket.width)
        levels, alive, first = [level], [given.drafting], 0
        mask = torch.zeros(batch, 1, 0, dtype=torch.bool, device=state.device)
        for depth in range(1, bucket.depth):
            alive.append(level.alive)
            front = _front(level, state, mask, first)
            first += level.tokens.shape[1]
            state, mask = self._expand(front, level.alive, given, depth)
            gate = given.thresholds[depth]
            level = self._level(state, front.scores, front.nodes, level.alive, gate, bucket.width)
            levels.append(level)
        return self._select(levels, given, bucket), _stats(levels, alive)

    def _roots(self, given: Given) -> Tensor:
        """[B, hidden] the drafter's states at each drafting request's last committed pair."""
        pages, drafting = given.pages, given.drafting
        last = (pages.kv_lens - 1).clamp(min=0)
        slots = pages.slots(torch.arange(len(last), device=last.device), last).masked_fill(~drafting, self._spare)
        own = drafting.long()
        view = pages.view(slots, torch.ones_like(own), last * own, own, drafting[:, None])
        features = self._drafter.project(self._cache.features[slots])
        return self._drafter.forward(given.roots, features, last, self._cache, view)

    def _expand(self, front: Front, alive: Tensor, given: Given, depth: int) -> tuple[Tensor, Tensor]:
        """The drafter over the front: states [B, F, hidden] and the mask with the rows themselves [B, F, E + F]."""
        pages, (batch, width), before = given.pages, front.tokens.shape, front.mask.shape[2]
        itself = torch.eye(width, dtype=torch.bool, device=front.mask.device).expand(batch, -1, -1)
        mask = torch.cat([front.mask, itself], dim=2)
        context = pages.kv_lens * alive  # a stopped request attends to nothing
        logical = context[:, None] + torch.arange(before, before + width, device=context.device)
        owner = torch.arange(batch, device=context.device)[:, None].expand(-1, width)
        slots = pages.slots(owner.reshape(-1), logical.reshape(-1)).view(batch, width)
        view = pages.view(
            slots.masked_fill(~alive[:, None], self._spare).reshape(-1), torch.full_like(context, width), context,
            alive * (before + width), mask.reshape(batch * width, -1),
        )  # fmt: skip
        positions = (context + depth - 1).repeat_interleave(width)
        states = self._drafter.forward(
            front.tokens.reshape(-1), front.features.reshape(batch * width, -1), positions, self._cache, view
        )
        return states.view(batch, width, -1), mask

    def _level(self, states: Tensor, scores: Tensor, nodes: Tensor, alive: Tensor, gate: Tensor, width: int) -> Level:
        """The children of the nodes [B, F] with these states, and who passes the gate []."""
        batch, front, _ = states.shape
        logits = self._drafter.logits(states.reshape(batch * front, -1))
        fan = min(width, logits.shape[1])
        thresholds = gate.expand(batch).contiguous()
        return self._decisions.gate_topk(
            logits, scores, nodes, alive, thresholds, self._drafter.vocabulary, fan, min(width, front * fan)
        )

    def _select(self, levels: list[Level], given: Given, bucket: Bucket) -> TreeRows:
        """The batch's likeliest nodes by calibrated score, within the budget."""
        sizes = [level.tokens.shape[1] for level in levels]
        device = given.roots.device
        depths = torch.cat([torch.full((size,), d, device=device) for d, size in enumerate(sizes)])
        scores = torch.cat([level.scores * given.powers[d] for d, level in enumerate(levels)], dim=1)
        candidates = Candidates(
            torch.cat([level.tokens for level in levels], dim=1), torch.cat([level.parents for level in levels], dim=1),
            depths, scores.masked_fill(scores < given.log_floor, NOTHING),
        )  # fmt: skip
        return self._decisions.pack_top(
            candidates, given.roots, given.budget, bucket.nodes, self._max_nodes, bucket.depth
        )


def _front(level: Level, states: Tensor, mask: Tensor, first: int) -> Front:
    """The likeliest nodes of a level whose parents have these states [B, F', hidden] and ancestors [B, F', E].

    `first` is the index of the level's first node in its forest.
    """
    parent = (level.best // (level.tokens.shape[1] // states.shape[1]))[:, :, None]
    return Front(
        first + level.best, level.tokens.gather(1, level.best), level.best_scores,
        states.gather(1, parent.expand(-1, -1, states.shape[2])), mask.gather(1, parent.expand(-1, -1, mask.shape[2])),
    )  # fmt: skip


def _stats(levels: list[Level], alive: list[Tensor]) -> DeviceDraftStats:
    """The numbers of the drafted levels; `alive` [B] a level says which requests drafted it."""
    drafted = torch.stack([(level.scores > NOTHING).sum() for level in levels]).sum(0, keepdim=True)
    by_depth = torch.stack(alive)  # [D, B]
    return DeviceDraftStats(
        drafted.int(), by_depth.sum(1).int(), by_depth.sum(0).int(), levels[0].best_scores[:, 0].exp()
    )
