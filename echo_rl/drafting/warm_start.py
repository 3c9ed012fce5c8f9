"""Starts the drafter in closed form, which saves it most of its first thousand updates.

Ridge regression from (features at i, embedding of token i + 1) to the target's last hidden state at i + 1 gives the
best linear drafter. It is written into the architecture exactly: the feature part is ``fc``; the embedding part is
carried by the leading attention heads, which are made to attend to their own position (queries and keys constant in
content, so that the rotary phase alone decides) and whose value and output projections hold the map's leading
singular directions. The other heads, the MLP and ``lm_head`` start from the target's own weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echo_rl.drafting.batches import Document, collate, plan_epoch
from echo_rl.drafting.features import FeatureShard
from echo_rl.drafting.model import FEATURE_SCALE, DrafterNet
from echo_rl.errors import ConfigError

SPREAD = 2.0
"""Root mean square of the residual stream that the regression aims at."""
SHARPNESS = 4.0
"""Height of a self-attending head's score peak, per rotary frequency used."""
FREQUENCIES = 6
RIDGE = 3e-3


@dataclass(frozen=True)
class TargetParts:
    """The target's weights that a drafter starts from. `gate` and `up` etc. are of its last layer."""

    embedding: Tensor  # [vocab, hidden]
    output: Tensor  # [vocab, hidden] (the embedding itself where tied)
    norm: Tensor  # [hidden] last norm
    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    q: Tensor  # [heads * head_dim, hidden]
    k: Tensor  # [kv_heads * head_dim, hidden]
    v: Tensor
    o: Tensor  # [hidden, heads * head_dim]
    gate: Tensor  # [intermediate, hidden]
    up: Tensor
    head_dim: int


def _regression_rows(
    shards: Sequence[FeatureShard], found: Sequence[Document], parts: TargetParts, limit: int, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix [D, D], cross products [D, hidden] and some inputs [n, D]; D = taps * hidden + hidden."""
    width = shards[0].taps.shape[1] + parts.embedding.shape[1]
    gram, cross = torch.zeros(width, width), torch.zeros(width, parts.embedding.shape[1])
    some, rows = [], 0
    for chosen in plan_epoch(found, 6000, rng):
        batch = collate(shards, chosen)
        embedded = F.embedding(batch.tokens[batch.rows + 1], parts.embedding).float()
        x = torch.cat([batch.taps[batch.rows].float() * FEATURE_SCALE, F.rms_norm(embedded, embedded.shape[-1:])], 1)
        gram += x.T @ x
        cross += x.T @ (batch.final[batch.rows + 1].float() / parts.norm.float())
        some.append(x[:200])
        rows += len(x)
        if rows >= limit:
            break
    if not rows:
        raise ConfigError("no conversation is long enough to learn from; generate longer answers")
    return gram, cross, torch.cat(some)


@torch.no_grad()
def warm_start(
    net: DrafterNet,
    shards: Sequence[FeatureShard],
    found: Sequence[Document],
    parts: TargetParts,
    *,
    limit: int,
    self_heads: int,
    seed: int,
) -> None:
    """Overwrite `net`'s parameters. Regresses on up to about `limit` rows of `found` (leave validation out)."""
    config, h, d = net.config, net.config.hidden, net.config.head_dim
    gram, cross, some = _regression_rows(shards, found, parts, limit, random.Random(seed))
    ridge = torch.diag(gram.diagonal() * RIDGE + 1e-6)
    best = torch.linalg.solve(gram + ridge, cross) * SPREAD  # [D, hidden]
    at: dict[str, Tensor] = {
        name.removeprefix("midlayer.").removesuffix(".weight"): value for name, value in net.named_parameters()
    }
    at["fc"].copy_(best[:-h].T)
    at["lm_head"].copy_(parts.output[net.vocabulary].float())
    at["norm"].copy_(parts.norm.float())
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        at[name].fill_(1.0)
    _copy_layer(at, parts, config.heads, config.kv_heads, d)
    if config.kv_heads == config.heads and self_heads:
        features = F.rms_norm(some[:, :-h] @ at["fc"].T, (h,))
        _self_attending(at, torch.cat([some[:, -h:], features], 1), best[-h:], min(self_heads, config.heads), d)


def _copy_layer(at: dict[str, Tensor], parts: TargetParts, heads: int, kv_heads: int, d: int) -> None:
    """Copy the target's last layer to the feature half; the embedding half gets nothing and the MLP is silent."""
    h = parts.norm.shape[0]

    def grown(matrix: Tensor, count: int) -> Tensor:
        """Repeat key/value heads up to `count`, with the layer's norm folded in."""
        folded = matrix.float() * parts.attention_norm.float()
        return folded.view(-1, d, h).repeat_interleave(count * d // len(folded), 0).reshape(-1, h)

    for name, matrix, count in (("q", parts.q, heads), ("k", parts.k, kv_heads), ("v", parts.v, kv_heads)):
        at[f"self_attn.{name}_proj"].zero_()[:, h:] = grown(matrix, count)
    # The target's residual stream is about 15 times as large as SPREAD; half of that is a cautious start.
    at["self_attn.o_proj"].copy_(parts.o.float() * (SPREAD / 60))
    size = at["mlp.gate_proj"].shape[0]
    for name, matrix in (("gate", parts.gate), ("up", parts.up)):
        at[f"mlp.{name}_proj"][: len(matrix)] = matrix[:size].float() * parts.mlp_norm.float()
    at["mlp.down_proj"].zero_()


def _self_attending(at: dict[str, Tensor], pairs: Tensor, carried: Tensor, count: int, d: int) -> None:
    """Make the first `count` heads attend to their own position and apply the map `carried` [hidden, hidden]."""
    h = carried.shape[0]
    left, singular, right = torch.linalg.svd(carried)
    lead = count * d
    at["self_attn.v_proj"][:lead] = 0
    at["self_attn.v_proj"][:lead, :h] = left[:, :lead].T
    at["self_attn.o_proj"][:, :lead] = (singular[:lead, None] * right[:lead]).T
    ridge = torch.eye(2 * h) * len(pairs) * 1e-3
    constant = torch.linalg.solve(pairs.T @ pairs + ridge, pairs.sum(0))  # [2 * hidden], pairs @ constant = 1
    phase = torch.zeros(d)
    phase[: min(FREQUENCIES, d // 2)] = (d**0.5 * SHARPNESS) ** 0.5
    for name in ("q_proj", "k_proj"):
        matrix = at[f"self_attn.{name}"]
        matrix[:lead] = matrix[:lead] * 0.3 + phase.repeat(count)[:, None] * constant
