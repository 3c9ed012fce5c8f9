"""Measures how many drafted tokens a greedy target would accept on held-out conversations, without serving them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from echo_rl.drafting.batches import Batch, Document, collate, plan_epoch
from echo_rl.drafting.features import FeatureShard
from echo_rl.drafting.model import DrafterNet, Rotary, Unroll


@dataclass(frozen=True)
class Acceptance:
    """Acceptance at every drafted level. Exact for greedy decoding where the conversations' answers are greedy."""

    top1: tuple[float, ...]
    """Share of chains whose level-s token is the target's, among those accepted up to level s - 1."""
    top8: tuple[float, ...]
    """Share of the same chains in which the target's token is among the drafter's 8 likeliest."""
    forced: tuple[float, ...]
    """Share of all positions whose token is the target's, whatever the earlier levels proposed."""
    chain_mat: float
    """Mean tokens a verification commits with a chain of that many drafts: 1 + sum of products of `top1`."""

    def to_json(self) -> dict[str, object]:
        return {name: value if isinstance(value, float) else list(value) for name, value in asdict(self).items()}


def _ratio(part: Tensor, whole: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in (part / whole.clamp_min(1)).tolist())


def _count(batch: Batch, net: DrafterNet, unroll: Unroll, to_draft: Tensor, levels: int) -> Tensor:
    """[5, levels]: reached, accepted, top-8 hits among reached, all labels, top-1 hits among all labels."""
    counts = torch.zeros(5, levels)
    alive = batch.rows + 1 + levels <= batch.last  # only chains that have all their labels
    output = unroll.weights["lm_head.weight"]
    for level, hidden in enumerate(unroll.steps(levels)):
        _, label, exists = batch.labels(level, to_draft)
        likeliest = (hidden @ output.t()).topk(min(8, len(output)), -1).indices
        hit, near = likeliest[:, 0] == label, (likeliest == label[:, None]).any(-1)
        masks = (alive, alive & hit, alive & near, exists, exists & hit)
        counts[:, level] = torch.stack([mask.sum() for mask in masks]).float()
        alive = alive & hit
    return counts


@torch.no_grad()
def measure(
    net: DrafterNet,
    shards: Sequence[FeatureShard],
    chosen: Sequence[Document],
    embedding: Tensor,
    to_draft: Tensor,
    *,
    levels: int = 7,
    tokens: int = 6000,
) -> Acceptance:
    """Acceptance of `net` on the documents. `to_draft` [vocab]: draft id of each target id, or -1."""
    weights, rotary = net.weights(embedding.dtype), Rotary.of(net.config, embedding.dtype)
    counts = torch.zeros(5, levels)
    for group in plan_epoch(chosen, tokens, random.Random(0)):
        batch = collate(shards, group)
        counts += _count(batch, net, Unroll(net.config, weights, embedding, rotary, batch), to_draft, levels)
    reached, accepted, near, labels, hits = counts
    mat = 1 + float(accepted.sum() / reached[0].clamp_min(1))
    return Acceptance(_ratio(accepted, reached), _ratio(near, reached), _ratio(hits, labels), round(mat, 4))
