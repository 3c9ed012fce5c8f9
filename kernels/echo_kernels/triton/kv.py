"""Moves rows within the caches: gather all of a pool's sources into scratch, then scatter them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.triton.aot_spec import KernelSpec

MAX_BLOCK = 1024


def compact_kv(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    count = src.shape[0]
    for pool in pools:
        layers, rows = pool.shape[:2]
        width = pool[0, 0].numel() if layers and rows else 0
        if not (count and width):
            continue
        scratch = pool.new_empty(layers, count, width)
        block = min(triton.next_power_of_2(width), MAX_BLOCK)
        grid = (count, layers, triton.cdiv(width, block))
        _copy_rows[grid](pool, scratch, src, None, rows, count, width, BLOCK=block)
        _copy_rows[grid](scratch, pool, None, dst, count, rows, width, BLOCK=block)


@triton.jit
def _copy_rows(
    source: tl.tensor,  # [layers, source_rows, width]
    target: tl.tensor,  # [layers, target_rows, width]
    source_index: tl.tensor,  # [K] int64, or None: row i
    target_index: tl.tensor,
    source_rows: tl.int32,
    target_rows: tl.int32,
    width: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    """target[:, target_index[i]] = source[:, source_index[i]], a piece of one row a program."""
    i, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    read = i if source_index is None else tl.load(source_index + i)
    write = i if target_index is None else tl.load(target_index + i)
    value = tl.load(source + (layer * source_rows + read) * width + column, mask=inside)
    tl.store(target + (layer * target_rows + write) * width + column, value, mask=inside)


def _aot() -> Iterator[KernelSpec]:
    for dtype in ("bf16", "fp16", "fp32"):
        for phase, index, missing in (
            ("gather", "source_index", "target_index"),
            ("scatter", "target_index", "source_index"),
        ):
            sizes = ("source_rows", "target_rows", "width")
            yield KernelSpec(
                f"compact_{phase}_{dtype}",
                _copy_rows,
                {"source": f"*{dtype}", "target": f"*{dtype}", index: "*i64"} | dict.fromkeys(sizes, "i32"),
                {missing: None, "BLOCK": MAX_BLOCK},
                aligned=frozenset({"source", "target", index, "width"}),
            )


AOT = tuple(_aot())
