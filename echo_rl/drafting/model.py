"""Defines the trainable drafter and its unrolled forward pass (EAGLE-3's training-time test).

Step 0 reads true features. Step s >= 1 reads the drafter's own hidden state of step s - 1, as it will have to at
serving time. A row's query at step s (position i + s) attends to the true-feature keys at positions <= i and to its
own keys of steps 1 .. s, which stand at positions i + 1 .. i + s: exactly what a drafter with a KV cache sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_rl.drafting.batches import Batch
from echo_rl.runtime.drafters.folder import DrafterConfig, offsets_of

FEATURE_SCALE = 1 / 16
"""Training sees features times this power of two, so that `fc` is as well conditioned as the other matrices.
Exported checkpoints have it folded into ``fc.weight``."""

Weights = dict[str, Tensor]


class DrafterNet(nn.Module):
    """The drafter's parameters under the names of the EAGLE-3 layout, float32 masters."""

    def __init__(self, config: DrafterConfig, vocabulary: Tensor) -> None:
        super().__init__()
        self.config = config
        self.vocabulary: Tensor
        self.register_buffer("vocabulary", vocabulary)  # [draft_vocab] ascending target ids
        for name, shape in config.shapes().items():
            if name == "d2t":
                continue
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5
            module.register_parameter(leaf, nn.Parameter(value))

    def weights(self, dtype: torch.dtype) -> Weights:
        """Differentiable copies in the compute precision, by layout name."""
        return {name: value.to(dtype) for name, value in self.named_parameters()}

    @torch.no_grad()
    def export(self, dtype: torch.dtype = torch.bfloat16) -> Weights:
        """The tensors of a drafter folder (`save_drafter`)."""
        out = {name: value.detach().clone() for name, value in self.named_parameters()}
        out["fc.weight"] *= FEATURE_SCALE
        return {name: value.to(dtype) for name, value in out.items()} | {"d2t": offsets_of(self.vocabulary)}


class Rotary(NamedTuple):
    """Tables of rotary positions, halves layout (first half pairs with second half)."""

    cos: Tensor  # [positions, head_dim]
    sin: Tensor

    @classmethod
    def of(cls, config: DrafterConfig, dtype: torch.dtype) -> Rotary:
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.outer(torch.arange(config.max_positions).float(), config.rope_theta**-half).repeat(1, 2)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """[R, heads, head_dim] rotated to positions [R]."""
        first, second = x.chunk(2, -1)
        return x * self.cos[positions, None] + torch.cat([-second, first], -1) * self.sin[positions, None]


class Unroll:
    """One batch's unrolled pass. `steps(S)` yields the normed hidden states [R, hidden] of steps 0 .. S - 1."""

    def __init__(
        self, config: DrafterConfig, weights: Weights, embedding: Tensor, rotary: Rotary, batch: Batch
    ) -> None:
        self.config, self.weights, self.rotary, self.batch = config, weights, rotary, batch
        self.features = self._linear(batch.taps.to(embedding.dtype) * FEATURE_SCALE, "fc")  # [N, hidden]
        following = torch.cat([batch.tokens[1:], batch.tokens[:1]])
        self.embedded = self._norm(F.embedding(following, embedding), "midlayer.input_layernorm")  # of token i + 1
        pairs = torch.cat([self.embedded, self._norm(self.features, "midlayer.hidden_norm")], -1)
        keys, values = self._keys_values(pairs, batch.positions)
        size = (len(batch.bias), batch.bias.shape[2])
        self.keys = self._padded(keys, batch.token_slots, size)  # [B, kv, T, head_dim]
        self.values = self._padded(values, batch.token_slots, size)
        self.bias = batch.bias.to(embedding.dtype)[:, None, None]  # [B, 1, 1, A, T]

    def steps(self, count: int) -> Iterator[Tensor]:
        batch = self.batch
        hidden, own_keys, own_values = self.features[batch.rows], [], []
        for step in range(count):
            index = (batch.rows + step).clamp_max(len(batch.tokens) - 1)
            last = len(self.rotary.cos) - 1  # steps past the longest context have no label
            positions = (batch.positions[batch.rows] + step).clamp_max(last)
            pairs = torch.cat([self.embedded[index], self._norm(hidden, "midlayer.hidden_norm")], -1)
            if step:
                keys, values = self._keys_values(pairs, positions)
                own_keys.append(self._padded(keys, batch.row_slots, batch.bias.shape[:2]))
                own_values.append(self._padded(values, batch.row_slots, batch.bias.shape[:2]))
            queries = self.rotary.turn(self._heads(self._linear(pairs, "midlayer.self_attn.q_proj")), positions)
            attended = self._attend(queries * self.config.head_dim**-0.5, own_keys, own_values)
            hidden = hidden + self._linear(attended, "midlayer.self_attn.o_proj")
            hidden = hidden + self._mlp(self._norm(hidden, "midlayer.post_attention_layernorm"))
            yield self._norm(hidden, "norm")

    def _attend(self, queries: Tensor, own_keys: list[Tensor], own_values: list[Tensor]) -> Tensor:
        """[R, heads, head_dim] -> [R, heads * head_dim] over the true-feature keys and the rows' own keys."""
        b, a, t = self.batch.bias.shape
        kv, d = self.config.kv_heads, self.config.head_dim
        grouped = self._padded(queries, self.batch.row_slots, (b, a)).reshape(b, kv, -1, a, d)  # [B, kv, g, A, d]
        scores = (grouped.reshape(b, kv, -1, d) @ self.keys.transpose(2, 3)).view(b, kv, -1, a, t) + self.bias
        if own_keys:
            own = torch.stack([(grouped * key[:, :, None]).sum(-1) for key in own_keys], -1)
            scores = torch.cat([scores, own], -1)  # [B, kv, g, A, T + s]
        shares = torch.softmax(scores, -1)
        out = (shares[..., :t].reshape(b, kv, -1, t) @ self.values).view_as(grouped)
        for step, value in enumerate(own_values):
            out = out + shares[..., t + step, None] * value[:, :, None]
        flat = out.reshape(b, -1, a, d).transpose(1, 2).reshape(b * a, -1)
        return flat[self.batch.row_slots]

    def _keys_values(self, pairs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys = self._heads(self._linear(pairs, "midlayer.self_attn.k_proj"))
        return self.rotary.turn(keys, positions), self._heads(self._linear(pairs, "midlayer.self_attn.v_proj"))

    def _mlp(self, x: Tensor) -> Tensor:
        gate = F.silu(self._linear(x, "midlayer.mlp.gate_proj"))
        return self._linear(gate * self._linear(x, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.config.head_dim)

    @staticmethod
    def _padded(x: Tensor, slots: Tensor, size: tuple[int, ...]) -> Tensor:
        """Packed [R, heads, d] -> padded [B, heads, L, d]; size = (B, L)."""
        flat = x.new_zeros(size[0] * size[1], *x.shape[1:]).index_copy(0, slots, x)
        return flat.view(*size, *x.shape[1:]).transpose(1, 2)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.config.eps)
