"""A tiny world: a target that counts in steps of 7 modulo 40, its conversations and their cached features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echo_rl.drafting.conversations import Conversations
from echo_rl.drafting.features import cache_features
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts

VOCAB, HIDDEN, HEADS, HEAD_DIM, INTER, TAPS = 40, 16, 2, 8, 24, (1, 3, 4)


@pytest.fixture
def parts() -> TargetParts:
    make = torch.Generator().manual_seed(3)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    embedding, ones = F.normalize(matrix(VOCAB, HIDDEN)) * 4, torch.ones(HIDDEN)
    square, mlp = (HIDDEN, HIDDEN), (INTER, HIDDEN)
    return TargetParts(
        embedding=embedding, output=embedding, norm=ones, attention_norm=ones, mlp_norm=ones,
        q=matrix(*square) / 4, k=matrix(*square) / 4, v=matrix(*square) / 4, o=matrix(*square) / 4,
        gate=matrix(*mlp) / 4, up=matrix(*mlp) / 4, head_dim=HEAD_DIM,
    )  # fmt: skip


@pytest.fixture
def target(parts: TargetParts) -> Callable[[Tensor], tuple[list[Tensor], Tensor]]:
    """Its last state is the embedding of the token it will say next."""

    def run(ids: Tensor) -> tuple[list[Tensor], Tensor]:
        now, following = parts.embedding[ids], parts.embedding[(ids + 7) % VOCAB]
        return [now, now * 3 + following, following * 5], F.rms_norm(following, (HIDDEN,))

    return run


@pytest.fixture
def world(tmp_path: Path, target: Callable[[Tensor], tuple[list[Tensor], Tensor]]) -> TrainConfig:
    """Two shards of conversations with cached features, and a config that trains on them in a second."""
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        items = []
        for number in range(10):
            first, length = shard * 10 + number, 14 + number
            items.append(([(first + 7 * step) % VOCAB for step in range(length)], 4 + number % 3, number != 0))
        Conversations.of(items).save(data / f"shard_{shard}.npz")
    cache_features(data, tmp_path / "features", target, TAPS, "counting", tokens_per_batch=64)
    return TrainConfig(
        data=str(data), features=str(tmp_path / "features"), out=str(tmp_path / "out"), draft_vocab=36, kv_heads=2,
        self_heads=2, intermediate=INTER, updates=6, batch_tokens=80, unroll=2, final_unroll=3, columns=30, warmup=2,
        regression_rows=0, validation=4, evaluate_every=3, lr=5e-3, output_lr=5e-3, max_positions=64,
        precision="float32",
    )  # fmt: skip
