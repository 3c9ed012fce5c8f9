"""Splits the fused projection, rotates queries and keys, writes keys and values to their slots: one launch."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.triton.aot_spec import KernelSpec

HEADS_BLOCK = 8


def rope_store(
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
) -> Tensor:
    rows, (_, kv_heads, dim) = qkv.shape[0], k_cache.shape
    q = qkv.new_empty(rows, num_heads, dim)
    if rows:
        grid = (rows, triton.cdiv(num_heads + 2 * kv_heads, HEADS_BLOCK))
        _rope_store[grid](
            qkv, cos, sin, positions, slots, k_cache, v_cache, q, q_weight, k_weight, eps,
            HEADS=num_heads, KV_HEADS=kv_heads, DIM=dim,
            HALF_BLOCK=triton.next_power_of_2(dim // 2), HEADS_BLOCK=HEADS_BLOCK,
        )  # fmt: skip
    return q


@triton.jit
def _rope_store(
    qkv: tl.tensor,  # [N, HEADS + 2 KV_HEADS, DIM]
    cos: tl.tensor,  # [P, DIM] float32
    sin: tl.tensor,
    positions: tl.tensor,  # [N] int64
    slots: tl.tensor,  # [N] int64, -1 = nowhere
    k_cache: tl.tensor,  # [S, KV_HEADS, DIM]
    v_cache: tl.tensor,
    q: tl.tensor,  # [N, HEADS, DIM], out
    q_weight: tl.tensor,  # [DIM] or None
    k_weight: tl.tensor,
    eps: tl.float32,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
) -> None:
    """A program holds both halves of a few heads of one row; a head's number says what becomes of it."""
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    d = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (d < HALF)
    is_q = inside & (head < HEADS)
    is_v = inside & (head >= HEADS + KV_HEADS)
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM + d
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if q_weight is not None:
        a, b = _head_norm(a, b, is_q, q_weight, d, eps, DIM)
    if k_weight is not None:
        a, b = _head_norm(a, b, inside & (head >= HEADS) & (head < HEADS + KV_HEADS), k_weight, d, eps, DIM)

    angle = tl.load(positions + row) * DIM + d
    in_table = d < HALF
    c1, s1 = tl.load(cos + angle, mask=in_table, other=0.0), tl.load(sin + angle, mask=in_table, other=0.0)
    c2 = tl.load(cos + angle + HALF, mask=in_table, other=0.0)
    s2 = tl.load(sin + angle + HALF, mask=in_table, other=0.0)
    turned_first = (a * c1 - b * s1).to(first.dtype)
    turned_second = (b * c2 + a * s2).to(first.dtype)

    target = q + (row * HEADS + head) * DIM + d
    tl.store(target, turned_first, mask=is_q)
    tl.store(target + HALF, turned_second, mask=is_q)
    slot = tl.load(slots + row)
    kept = inside & (slot >= 0)
    is_k = kept & (head >= HEADS) & (head < HEADS + KV_HEADS)
    target = k_cache + (slot * KV_HEADS + head - HEADS) * DIM + d
    tl.store(target, turned_first, mask=is_k)
    tl.store(target + HALF, turned_second, mask=is_k)
    target = v_cache + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM + d
    tl.store(target, first, mask=kept & is_v)
    tl.store(target + HALF, second, mask=kept & is_v)


@triton.jit
def _head_norm(
    a: tl.tensor, b: tl.tensor, chosen: tl.tensor, weight: tl.tensor, d: tl.tensor, eps: tl.float32, DIM: tl.constexpr
) -> tl.tensor:
    """The halves a, b of each chosen head over the head's root mean square, times the weight; float32."""
    HALF: tl.constexpr = DIM // 2
    mean = tl.sum(a * a + b * b, axis=1, keep_dims=True) / DIM
    scale = tl.rsqrt(mean + eps)
    w1 = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
    w2 = tl.load(weight + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    return tl.where(chosen, a * scale * w1, a), tl.where(chosen, b * scale * w2, b)


def _aot() -> Iterator[KernelSpec]:
    for dtype in ("bf16", "fp16", "fp32"):
        for dim in (64, 128):
            for norm in (False, True):
                pointers = dict.fromkeys(("qkv", "k_cache", "v_cache", "q"), f"*{dtype}")
                weights = ("q_weight", "k_weight")
                pointers |= {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "slots": "*i64"}
                pointers |= dict.fromkeys(weights, f"*{dtype}") if norm else {}
                sizes = {"HEADS": 32, "KV_HEADS": 8, "DIM": dim, "HALF_BLOCK": dim // 2, "HEADS_BLOCK": HEADS_BLOCK}
                yield KernelSpec(
                    f"rope_store_{dtype}_d{dim}{'_norm' if norm else ''}",
                    _rope_store,
                    pointers | {"eps": "fp32"},
                    sizes | ({} if norm else dict.fromkeys(weights)),
                    aligned=frozenset(pointers),
                )


AOT = tuple(_aot())
