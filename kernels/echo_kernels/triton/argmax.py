"""Finds the likeliest token of some rows, without a copy of the logits: one program a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.triton.aot_spec import KernelSpec

MAX_BLOCK = 4096
WARPS = 8


def best_token(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    count, vocab = rows.shape[0], logits.shape[1]
    tokens = torch.empty_like(rows)
    best = logits.new_empty(count, dtype=torch.float32)
    if count:
        block = min(triton.next_power_of_2(vocab), MAX_BLOCK)
        _best_token[(count,)](logits, rows, tokens, best, vocab, BLOCK=block, num_warps=WARPS)
    return tokens, best


@triton.jit
def _best_token(
    logits: tl.tensor,  # [N, vocab]
    rows: tl.tensor,  # [R] int64
    tokens: tl.tensor,  # [R] int64, out
    best: tl.tensor,  # [R] float32, out
    vocab: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    """Every lane keeps the first of its highest logits; the lanes are compared once, at the end."""
    out = tl.program_id(0)
    row = logits + tl.load(rows + out) * vocab
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    place = lane
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        x = tl.load(row + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        place = tl.where(x > highest, column, place)
        highest = tl.where(x > highest, x, highest)
        wrong |= (x != x).to(tl.int32)
    top = tl.max(highest, axis=0)
    first = tl.min(tl.where(highest == top, place, vocab), axis=0)
    is_nan = tl.max(wrong, axis=0) > 0
    tl.store(tokens + out, tl.where(is_nan, 0, first).to(tl.int64))
    tl.store(best + out, tl.where(is_nan, float("nan"), top))


def _aot() -> Iterator[KernelSpec]:
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {"logits": f"*{dtype}", "rows": "*i64", "tokens": "*i64", "best": "*fp32"}
        yield KernelSpec(
            f"best_token_{dtype}",
            _best_token,
            pointers | {"vocab": "i32"},
            {"BLOCK": MAX_BLOCK},
            num_warps=WARPS,
            aligned=frozenset({*pointers, "vocab"}),
        )


AOT = tuple(_aot())
