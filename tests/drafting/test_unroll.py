"""The fused unroll against a literal drafter that decodes one token at a time with a growing list of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echo_rl.drafting.batches import collate, documents
from echo_rl.drafting.features import open_features
from echo_rl.drafting.model import DrafterNet, Rotary, Unroll
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts
from echo_rl.runtime.drafters.folder import DrafterConfig


class LiteralDrafter:
    """One sequence, one position a call, written from the architecture and the exported tensors alone."""

    def __init__(self, config: DrafterConfig, tensors: dict[str, Tensor], embedding: Tensor) -> None:
        self.config, self.embedding = config, embedding
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.at = {name.removeprefix("midlayer.").removesuffix(".weight"): value for name, value in tensors.items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.config.eps).sqrt() * self.at[name]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = self.config.head_dim // 2
        angle = position * self.config.rope_theta ** (-torch.arange(half) / half)
        first, second = x[:, :half], x[:, half:]
        parts = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat(parts, 1)

    def call(self, feature: Tensor, token: int, position: int) -> tuple[Tensor, Tensor]:
        """(hidden before the norm, normed hidden) after appending this position to the keys."""
        d, group = self.config.head_dim, self.config.heads // self.config.kv_heads
        pair = torch.cat([self.norm(self.embedding[token], "input_layernorm"), self.norm(feature, "hidden_norm")])
        self.keys.append(self.rotate((self.at["self_attn.k_proj"] @ pair).view(-1, d), position))
        self.values.append((self.at["self_attn.v_proj"] @ pair).view(-1, d))
        queries = self.rotate((self.at["self_attn.q_proj"] @ pair).view(-1, d), position)
        heads = []
        for head, query in enumerate(queries):
            keys = torch.stack([key[head // group] for key in self.keys])
            shares = torch.softmax(keys @ query / d**0.5, 0)
            heads.append(shares @ torch.stack([value[head // group] for value in self.values]))
        hidden = feature + self.at["self_attn.o_proj"] @ torch.cat(heads)
        x = self.norm(hidden, "post_attention_layernorm")
        gated = F.silu(self.at["mlp.gate_proj"] @ x) * (self.at["mlp.up_proj"] @ x)
        hidden = hidden + self.at["mlp.down_proj"] @ gated
        return hidden, self.norm(hidden, "norm")


def test_unroll_equals_a_drafter_that_decodes_step_by_step(world: TrainConfig, parts: TargetParts) -> None:
    shards = open_features(world.data, world.features)
    chosen = documents(shards)[3:6]
    for kv_heads in (1, 2):
        config = DrafterConfig(16, 16, 40, (1, 3, 4), 2, kv_heads, 8, 24, 36, rope_theta=100.0, max_positions=64)
        torch.manual_seed(0)
        net = DrafterNet(config, torch.arange(2, 38))
        tensors = net.export(torch.float32)
        batch = collate(shards, chosen)
        with torch.no_grad():
            unroll = Unroll(
                config, net.weights(torch.float32), parts.embedding, Rotary.of(config, torch.float32), batch
            )
            fused = torch.stack(list(unroll.steps(4)))  # [4, R, hidden]
        row = 0
        for item in chosen:
            taps, _ = shards[item.shard].rows(item.index)
            tokens = shards[item.shard].conversations[item.index].tolist()
            for position in range(item.first_row, item.length - 2):
                drafter = LiteralDrafter(config, tensors, parts.embedding)
                for past in range(position + 1):
                    feature = tensors["fc.weight"] @ taps[past].float()
                    hidden, normed = drafter.call(feature, tokens[past + 1], past)
                torch.testing.assert_close(fused[0, row], normed, atol=2e-4, rtol=2e-4)
                for step in range(1, min(4, item.length - 1 - position)):
                    hidden, normed = drafter.call(hidden, tokens[position + 1 + step], position + step)
                    torch.testing.assert_close(fused[step, row], normed, atol=2e-4, rtol=2e-4)
                row += 1
        assert row == fused.shape[1]


def test_rows_predict_the_token_after_the_next(world: TrainConfig) -> None:
    shards = open_features(world.data, world.features)
    chosen = documents(shards)[:3]
    batch = collate(shards, chosen)
    identity = torch.arange(40)
    assert len(batch.rows) == sum(item.rows for item in chosen)
    for step in range(3):
        index, label, exists = batch.labels(step, identity)
        assert torch.equal(exists, batch.rows + 2 + step <= batch.last)
        assert torch.equal(label[exists], (batch.tokens[batch.rows][exists] + 7 * (2 + step)) % 40)
        assert torch.equal(index[exists], (batch.rows + 2 + step)[exists])
    first = batch.rows[:1]  # the last prompt token of the first conversation
    assert int(batch.positions[first]) == chosen[0].start - 1
