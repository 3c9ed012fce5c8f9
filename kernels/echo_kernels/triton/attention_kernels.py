"""Holds the kernels behind `echo_kernels.triton.attention`: online softmax over tiles of keys.

A program holds one tile of query rows of one request, all heads of one KV head packed into the tile's
height, and walks the request's keys (Dao et al., FlashAttention, arXiv 2205.14135). With few programs
the keys are split among several and `combine` joins their parts. A program without rows ends at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from echo_kernels.triton.aot_spec import KernelSpec
from echo_kernels.triton.attention_plan import MAX_SPLITS, plan_attention

SEARCH = tl.constexpr(128)
"""Requests that a program compares at once to find its own."""
NOTHING = tl.constexpr(-1.0)
"""The weight sum of a part whose row saw no key: no true sum is negative."""


@triton.jit
def attend(
    q: tl.tensor,  # [N, H, DIM]
    k_cache: tl.tensor,  # [S, KV_HEADS, DIM]
    v_cache: tl.tensor,
    tables: tl.tensor,  # [B, blocks] int32, rows table_stride apart
    q_start: tl.tensor,  # [B + 1] int32
    ctx_lens: tl.tensor,  # [B] int32
    kv_lens: tl.tensor,  # [B] int32
    mask: tl.tensor,  # [N, W] bool, rows mask_stride apart
    out: tl.tensor,  # [N, H, DIM]
    parts: tl.tensor,  # [N, H, splits, DIM] float32, this and the next two only if SPLIT
    maxima: tl.tensor,  # [N, H, splits] float32
    sums: tl.tensor,  # [N, H, splits] float32
    batch: tl.int32,
    table_stride: tl.int32,
    mask_stride: tl.int32,
    scale: tl.float32,  # of the logits, in powers of two
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = _request_of(tile, q_start, batch, ROWS)
    begin, end = tl.load(q_start + request), tl.load(q_start + request + 1)
    first = begin + (tile - begin // ROWS - request) * ROWS
    if first >= end:
        return
    i = tl.arange(0, BLOCK_M)
    row = first + i // GROUP
    live = (i < ROWS * GROUP) & (row < end)
    head = row.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + i % GROUP  # in q and out
    d = tl.arange(0, WIDTH)
    in_head = live[:, None] & (d < DIM)[None, :]
    queries = tl.load(q + head[:, None] * DIM + d[None, :], mask=in_head, other=0.0)

    ctx, kv = tl.load(ctx_lens + request), tl.load(kv_lens + request)
    low, high = 0, kv
    if SPLIT:
        share = tl.cdiv(tl.cdiv(kv, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        low, high = split * share, tl.minimum(split * share + share, kv)
    open_end = tl.maximum(low, tl.minimum(ctx, high) // BLOCK_N * BLOCK_N)  # below: whole tiles of context
    table = tables + request.to(tl.int64) * table_stride
    k_head, v_head = k_cache + kv_head * DIM, v_cache + kv_head * DIM
    mask_row = mask + row.to(tl.int64) * mask_stride

    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    seen = live & (low < tl.minimum(ctx, high))
    for start in range(low, open_end, BLOCK_N):
        line = _lines(table, start, high, True, KV_HEADS, DIM, BLOCK_SIZE, BLOCK_N)
        keys = _load(k_head, line, start, high, True, DIM, WIDTH, BLOCK_N)
        logits = tl.dot(queries, keys.T, input_precision="ieee") * scale
        weights, rescale, maximum, total = _weigh(logits, maximum, total)
        values = _load(v_head, line, start, high, True, DIM, WIDTH, BLOCK_N)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    for start in range(open_end, high, BLOCK_T):
        line = _lines(table, start, high, False, KV_HEADS, DIM, BLOCK_SIZE, BLOCK_T)
        keys = _load(k_head, line, start, high, False, DIM, WIDTH, BLOCK_T)
        logits = tl.dot(queries, keys.T, input_precision="ieee") * scale
        position = start + tl.arange(0, BLOCK_T)[None, :]
        visible = _visible(mask_row, live, position, ctx, high)
        seen = seen | (tl.max(visible.to(tl.int32), axis=1) > 0)
        weights, rescale, maximum, total = _weigh(tl.where(visible, logits, float("-inf")), maximum, total)
        values = _load(v_head, line, start, high, False, DIM, WIDTH, BLOCK_T)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")

    if SPLIT:
        part = head * tl.num_programs(2) + split
        tl.store(maxima + part, maximum, mask=live)
        tl.store(sums + part, tl.where(seen, total, NOTHING), mask=live)
        tl.store(parts + part[:, None] * DIM + d[None, :], acc, mask=in_head & seen[:, None])
    else:
        # A row that saw only logits of -inf divides zero by zero: NaN, as softmax gives.
        result = tl.where(seen[:, None], acc / total[:, None], 0.0)
        tl.store(out + head[:, None] * DIM + d[None, :], result.to(queries.dtype), mask=in_head)


@triton.jit
def _request_of(tile: tl.tensor, q_start: tl.tensor, batch: tl.int32, ROWS: tl.constexpr) -> tl.tensor:
    """The request of a tile: those of request r begin at q_start[r] // ROWS + r, at most one too many for each."""
    found = 0
    for start in range(0, batch, SEARCH):
        r = start + tl.arange(0, SEARCH)
        begin = tl.load(q_start + r, mask=r < batch, other=0) // ROWS + r
        found += tl.sum(((r < batch) & (begin <= tile)).to(tl.int32), axis=0)
    return found - 1


@triton.jit
def _lines(
    table: tl.tensor,
    start: tl.int32,
    end: tl.int32,
    WHOLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N] int64: the places in a cache where the rows of logical positions from `start` begin."""
    offset = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:  # one page holds the tile
        slot = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + offset
    else:
        position = start + offset
        block = table + position // BLOCK_SIZE
        page = tl.load(block) if WHOLE else tl.load(block, mask=position < end, other=0)
        slot = page.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    return slot * (KV_HEADS * DIM)


@triton.jit
def _load(
    head: tl.tensor,
    line: tl.tensor,
    start: tl.int32,
    end: tl.int32,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, WIDTH] of one KV head at `_lines`; 0 from logical position `end` and dimension DIM on."""
    d = tl.arange(0, WIDTH)[None, :]
    at = head + line[:, None] + d
    if WHOLE and WIDTH == DIM:
        return tl.load(at)
    return tl.load(at, mask=(start + tl.arange(0, BLOCK_N) < end)[:, None] & (d < DIM), other=0.0)


@triton.jit
def _visible(mask_row: tl.tensor, live: tl.tensor, position: tl.tensor, ctx: tl.int32, end: tl.int32) -> tl.tensor:
    """[BLOCK_M, BLOCK_N] bool: all of the context, the tree's nodes where the mask says so, nothing from `end` on."""
    in_tree = live[:, None] & (position >= ctx) & (position < end)
    in_context = live[:, None] & (position < tl.minimum(ctx, end))
    return in_context | tl.load(mask_row[:, None] + (position - ctx), mask=in_tree, other=0).to(tl.int1)


@triton.jit
def _weigh(logits: tl.tensor, maximum: tl.tensor, total: tl.tensor) -> tl.tensor:
    """One step of the online softmax over logits [BLOCK_M, BLOCK_N] in powers of two, -inf where hidden.

    Returns the tile's weights, the factor for what was summed before, the new maximum and weight sum.
    """
    higher = tl.maximum(maximum, tl.max(logits, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
    weights = tl.exp2(logits - base[:, None])
    rescale = tl.exp2(maximum - base)
    return weights, rescale, higher, total * rescale + tl.sum(weights, axis=1)


@triton.jit
def combine(
    out: tl.tensor,  # [N, HEADS, DIM]
    parts: tl.tensor,  # [N, HEADS, SPLITS, DIM]
    maxima: tl.tensor,  # [N, HEADS, SPLITS]
    sums: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Joins the parts of one row and head: each weighs its sum, brought to the common maximum."""
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    part = head * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    maximum, total = tl.load(maxima + part), tl.load(sums + part)
    saw = total != NOTHING
    highest = tl.max(maximum, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.where(saw, tl.exp2(maximum - base), 0.0)
    inside = saw[:, None] & (d < DIM)[None, :]
    acc = tl.load(parts + part[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    joined = tl.sum(acc * weight[:, None], axis=0) / tl.sum(tl.where(saw, total, 0.0) * weight, axis=0)
    joined = tl.where(tl.max(saw.to(tl.int32), axis=0) > 0, joined, 0.0)
    tl.store(out + head * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)


def _aot() -> Iterator[KernelSpec]:
    """Both page sizes, head sizes and every tile height in bfloat16; the other dtypes and groups once each."""
    for dim in (64, 128):
        for block_size in (16, 64):
            yield _attend_spec("bf16", dim, block_size, 4, 32, split=False)
            yield _attend_spec("bf16", dim, block_size, 4, 4, split=True)
        yield _attend_spec("bf16", dim, 16, 4, 8, split=False)
        yield _attend_spec("fp32", dim, 16, 4, 32, split=False)
    for group in (1, 3, 8):
        yield _attend_spec("bf16", 128, 16, group, 16, split=False)
    yield _attend_spec("fp16", 128, 16, 4, 32, split=False)
    yield _attend_spec("fp32", 128, 64, 4, 4, split=True)
    for dtype in ("bf16", "fp32"):
        pointers = {"out": f"*{dtype}", "parts": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
        sizes = {"HEADS": 32, "DIM": 128, "WIDTH": 128, "SPLITS": MAX_SPLITS}
        yield KernelSpec(f"attention_combine_{dtype}", combine, pointers, sizes, aligned=frozenset(pointers))


def _attend_spec(dtype: str, dim: int, block_size: int, group: int, rows: int, split: bool) -> KernelSpec:
    """The specialisation that `attention.tree_attention` launches for one request of `rows` rows under 8 KV heads."""
    plan = plan_attention(rows, 1, group, 8, dim, 8192, 4 if dtype == "fp32" else 2, 132 if split else 1)
    assert (plan.splits > 1) is split
    floats = ("q", "k_cache", "v_cache", "out")
    lengths = ("tables", "q_start", "ctx_lens", "kv_lens")
    parts = ("parts", "maxima", "sums")
    pointers = dict.fromkeys(floats, f"*{dtype}") | dict.fromkeys(lengths, "*i32") | {"mask": "*i1"}
    pointers |= dict.fromkeys(parts, "*fp32") if split else {}
    return KernelSpec(
        f"attention_{dtype}_d{dim}_b{block_size}_g{group}_m{plan.block_m}{'_split' if split else ''}",
        attend,
        pointers | dict.fromkeys(("batch", "table_stride", "mask_stride"), "i32") | {"scale": "fp32"},
        {
            "KV_HEADS": 8, "GROUP": group, "DIM": dim, "WIDTH": dim, "BLOCK_SIZE": block_size,
            "ROWS": plan.rows, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_T": plan.block_t,
            "SPLIT": split,
        } | ({} if split else dict.fromkeys(parts)),
        plan.warps,
        plan.stages,
        aligned=frozenset(pointers),
    )  # fmt: skip


AOT = tuple(_aot())
