"""Runs the target model over flattened rows: every linear layer sees one [N, hidden] activation.

Knows nothing about requests, trees or sampling: an `AttentionView` tells attention which rows see which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from echo_kernels import ops_for
from echo_kernels.interface import Implementation
from echo_kernels.ops import Ops
from echo_rl.errors import WeightsError
from echo_rl.runtime.kv_cache import AttentionView, KVCache
from echo_rl.runtime.models.architecture import Architecture, read_architecture, rope_table
from echo_rl.runtime.models.checkpoint import TensorReader, read_tensors
from echo_rl.runtime.models.linear import Linear


@dataclass(frozen=True)
class Layer:
    """One decoder layer, projections that share an input fused into one matrix."""

    input_norm: torch.Tensor
    qkv: Linear  # hidden -> (H + 2 KV) D
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear  # H D -> hidden
    post_norm: torch.Tensor
    gate_up: Linear  # hidden -> 2 I
    down: Linear  # I -> hidden


class Target:
    """A loaded target. `taps` are the layers after which hidden states are kept for the drafter."""

    def __init__(self, arch: Architecture, reader: TensorReader, max_positions: int, device: torch.device) -> None:
        self.arch = arch
        self.ops = ops_for(device)
        self.embed = reader.take("model.embed_tokens.weight", arch.vocab, arch.hidden)
        self.norm = reader.take("model.norm.weight", arch.hidden)
        tied = arch.ties("lm_head.weight" in reader)
        self.lm_head = Linear(self.embed if tied else reader.take("lm_head.weight", arch.vocab, arch.hidden))
        self.layers = [_read_layer(arch, reader, i) for i in range(arch.layers)]
        unknown = {n for n in reader.unread if not n.endswith("rotary_emb.inv_freq") and n != "lm_head.weight"}
        if unknown:
            raise WeightsError(
                f"{arch.name} has tensors this runtime would ignore: {sorted(unknown)[:3]}; refuse to guess"
            )
        cos, sin = rope_table(arch.head_dim, arch.rope_theta, max_positions, arch.rope_scaling)
        self.cos, self.sin = cos.to(device), sin.to(device)

    @classmethod
    def load(cls, folder: Path, max_positions: int, device: torch.device, dtype: torch.dtype) -> Target:
        """Load a Hugging Face folder. Raises `WeightsError`."""
        arch = read_architecture(folder)
        return cls(arch, TensorReader(read_tensors(folder), device, dtype), max_positions, device)

    def forward(
        self,
        tokens: torch.Tensor,  # [N] int64
        positions: torch.Tensor,  # [N] int64
        cache: KVCache,
        view: AttentionView,
        taps: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass. Writes keys and values of all rows; returns hidden states before the final norm
        [N, hidden] and, with taps, their concatenation [N, len(taps) * hidden]."""
        ops: Ops | Implementation = self.ops
        eps, scale = self.arch.eps, self.arch.head_dim**-0.5
        residual = F.embedding(tokens, self.embed)
        x = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        kept: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self.layers):
            q = ops.rope_store(
                layer.qkv(x), self.cos, self.sin, positions, view.slots,
                cache.k[i], cache.v[i], self.arch.heads, layer.q_norm, layer.k_norm, eps,
            )  # fmt: skip
            attended = ops.tree_attention(
                q, cache.k[i], cache.v[i], view.block_tables, view.block_size,
                view.q_start, view.ctx_lens, view.kv_lens, view.mask, scale,
            )  # fmt: skip
            x = layer.out(attended.flatten(1))
            x, residual = ops.add_rms_norm(x, residual, layer.post_norm, eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
            if i + 1 < len(self.layers):
                x, residual = ops.add_rms_norm(x, residual, self.layers[i + 1].input_norm, eps)
            else:
                residual = residual + x
            if i in taps:
                kept[i] = residual.clone()  # the next layer adds to `residual` in place
            ops = self.ops.trusted  # the other layers' calls are shaped like the first one's
        return residual, torch.cat([kept[i] for i in taps], dim=1) if taps else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] before the final norm -> [R, vocab] in the model's dtype."""
        return self.lm_head(self.ops.rms_norm(hidden, self.norm, self.arch.eps))


def _read_layer(arch: Architecture, reader: TensorReader, index: int) -> Layer:
    p = f"model.layers.{index}."
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim

    def fused(parts: tuple[tuple[str, int], ...], columns: int) -> torch.Tensor:
        return torch.cat([reader.take(f"{p}{name}.weight", rows, columns) for name, rows in parts])

    heads = (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
    gates = (("mlp.gate_proj", arch.intermediate), ("mlp.up_proj", arch.intermediate))
    take_out = reader.take if arch.attention_bias else reader.take_if_there
    biased = arch.biased or any(f"{p}{name}.bias" in reader for name, _ in heads)
    bias = torch.cat([reader.take(f"{p}{name}.bias", rows) for name, rows in heads]) if biased else None
    return Layer(
        input_norm=reader.take(f"{p}input_layernorm.weight", arch.hidden),
        qkv=Linear(fused(heads, arch.hidden), bias),
        q_norm=reader.take(f"{p}self_attn.q_norm.weight", arch.head_dim) if arch.normed else None,
        k_norm=reader.take(f"{p}self_attn.k_norm.weight", arch.head_dim) if arch.normed else None,
        out=Linear(
            reader.take(f"{p}self_attn.o_proj.weight", arch.hidden, q),
            take_out(f"{p}self_attn.o_proj.bias", arch.hidden),
        ),
        post_norm=reader.take(f"{p}post_attention_layernorm.weight", arch.hidden),
        gate_up=Linear(fused(gates, arch.hidden)),
        down=Linear(reader.take(f"{p}mlp.down_proj.weight", arch.hidden, arch.intermediate)),
    )
