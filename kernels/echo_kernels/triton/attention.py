"""Launches paged, ragged attention under a tree mask, cut into programs.

The host never learns a length: grids are upper bounds. Under one plan a request's bits do not depend
on the rest of the batch. The plan itself follows the batch, so another batch may round otherwise.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from echo_kernels.triton.attention_kernels import attend, combine
from echo_kernels.triton.attention_plan import Plan, plan_attention

LOG2_E = 1.4426950408889634
MIN_WIDTH = 16


def tree_attention(
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
) -> Tensor:
    out = torch.empty_like(q)
    if not out.numel():
        return out
    (rows, heads, dim), (batch, blocks), kv_heads = q.shape, block_tables.shape, k_cache.shape[1]
    plan = plan_attention(
        rows, batch, heads // kv_heads, kv_heads, _width(dim), blocks * block_size, q.element_size(),
        _processors(q.device),
    )  # fmt: skip
    launch(plan, out, q, k_cache, v_cache, block_tables, block_size, q_start, ctx_lens, kv_lens, mask, scale)
    return out


def launch(
    plan: Plan,
    out: Tensor,
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
) -> None:
    """Fills `out` [N, H, D] under a given plan."""
    (rows, heads, dim), kv_heads, batch = q.shape, k_cache.shape[1], block_tables.shape[0]
    split = plan.splits > 1
    sums = maxima = parts = None
    if split:
        sums, maxima = (q.new_empty(rows, heads, plan.splits, dtype=torch.float32) for _ in range(2))
        parts = q.new_empty(rows, heads, plan.splits, dim, dtype=torch.float32)
    grid = (rows // plan.rows + batch, kv_heads, plan.splits)
    attend[grid](
        q, k_cache, v_cache, block_tables, q_start, ctx_lens, kv_lens, mask, out, parts, maxima, sums,
        batch, block_tables.stride(0), mask.stride(0), scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, WIDTH=_width(dim), BLOCK_SIZE=block_size,
        ROWS=plan.rows, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_T=plan.block_t, SPLIT=split,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if split:
        combine[(rows, heads)](out, parts, maxima, sums, HEADS=heads, DIM=dim, WIDTH=_width(dim), SPLITS=plan.splits)


def _width(dim: int) -> int:
    return max(triton.next_power_of_2(dim), MIN_WIDTH)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; 1 for a CPU, which interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
