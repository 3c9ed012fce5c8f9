"""Defines the protocol that every backend follows: the unchecked operations, with identical meaning.

`echo_kernels.reference` is the specification; `echo_kernels.ops.Ops` documents each operation and
checks its arguments before it calls one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Implementation(Protocol):
    """A backend: a module or an object with these callables. Arguments were checked by the caller."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, /) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, /) -> tuple[Tensor, Tensor]: ...

    def rope_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        num_heads: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        /,
    ) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor, /) -> Tensor: ...

    def tree_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        block_size: int,
        q_start: Tensor,
        ctx_lens: Tensor,
        kv_lens: Tensor,
        mask: Tensor,
        scale: float,
        /,
    ) -> Tensor: ...

    def compact_kv(self, pools: Sequence[Tensor], src: Tensor, dst: Tensor, /) -> None: ...

    def gumbel(self, seeds: Tensor, positions: Tensor, vocab: int, device: torch.device, /) -> Tensor: ...

    def pack_weight(self, weight: Tensor, /) -> Tensor | None: ...

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor | None, /) -> Tensor: ...

    def pack_int8(self, weight: Tensor, /) -> tuple[Tensor, Tensor] | None: ...

    def linear_int8(self, x: Tensor, panels: Tensor, scales: Tensor, /) -> Tensor: ...

    def best_token(self, logits: Tensor, rows: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def top_tokens(self, logits: Tensor, k: int, /) -> tuple[Tensor, Tensor]: ...
