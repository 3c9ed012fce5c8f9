"""Holds the tensors behind the paged cache. Rows are *slots*; which request owns a slot is the block manager's
business."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_kernels import ops_for
from echo_rl.runtime.memory import allocating


@dataclass(frozen=True)
class KVCache:
    """Target keys and values, the drafter's own (one layer), and the target features that the drafter reads.

    S slots, L target layers, F the width of the concatenated feature taps (0 without a drafter).
    """

    k: torch.Tensor  # [L, S, KV, D]
    v: torch.Tensor  # [L, S, KV, D]
    draft_k: torch.Tensor  # [S, KV', D']
    draft_v: torch.Tensor  # [S, KV', D']
    features: torch.Tensor  # [S, F]

    @classmethod
    def allocate(
        cls,
        slots: int,
        target: tuple[int, int, int],
        drafter: tuple[int, int, int] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KVCache:
        """`target` is (layers, kv heads, head dim); `drafter` is (kv heads, head dim, feature width).

        Raises `ConfigError` where they don't fit the memory.
        """

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        layers, kv, dim = target
        draft_kv, draft_dim, width = drafter or (0, 0, 0)
        pool = (layers, slots, kv, dim)
        drafts = (slots, draft_kv, draft_dim)
        with allocating("the KV cache", "kv_tokens"):
            return cls(zeros(*pool), zeros(*pool), zeros(*drafts), zeros(*drafts), zeros(slots, width))

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Move accepted rows (slots `source` [K]) to their final slots `target` [K]."""
        ops_for(self.k.device).compact_kv((self.k, self.v, self.features.unsqueeze(0)), source, target)


@dataclass(frozen=True)
class AttentionView:
    """The cache rows that each query row may see, in the form that `tree_attention` reads.

    R requests, N query rows. A row of request r sees its logical positions below ctx_lens[r], and
    position ctx_lens[r] + w where mask[row, w].
    """

    slots: torch.Tensor  # [N] int64, where the row's own key and value go
    block_tables: torch.Tensor  # [R, blocks] int32
    block_size: int
    q_start: torch.Tensor  # [R + 1] int32
    ctx_lens: torch.Tensor  # [R] int32
    kv_lens: torch.Tensor  # [R] int32
    mask: torch.Tensor  # [N, W] bool
