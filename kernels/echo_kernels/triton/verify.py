"""Verifies without the host: draw the token that belongs after every row, then walk every tree.

Two launches. `_draw` reads the logits once, a row and a piece of the vocabulary a program, with the
noise computed in registers. `_walk` has one program a request, joins the pieces of the rows that it
visits and follows the children; its tree stays in registers, so a step down costs two small loads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.device_interface import DrawKeys, TreeRows, Walk
from echo_kernels.triton.aot_spec import KernelSpec
from echo_kernels.triton.gumbel import noise, row_key

SPAN = 8192
"""Vocabulary entries that one program reads."""
BLOCK = 1024
"""Vocabulary entries that it reads at a time."""


def verify_tree(logits: Tensor, rows: TreeRows, keys: DrawKeys, max_depth: int) -> Walk:
    count, vocab = logits.shape
    batch, splits = rows.starts.shape[0] - 1, triton.cdiv(vocab, SPAN)
    best, peak = logits.new_empty(2, count, splits, dtype=torch.float32).unbind(0)
    drawn = logits.new_empty(count, splits, dtype=torch.int32)
    walk = Walk(
        tokens=logits.new_empty(batch, max_depth + 1, dtype=torch.int64),
        accepted=logits.new_empty(batch, max_depth, dtype=torch.int32),
        lengths=logits.new_empty(batch, dtype=torch.int32),
        failed=logits.new_empty(batch, dtype=torch.bool),
    )
    if batch:
        _draw[(count, splits)](
            logits, rows.owner, rows.depths, keys.temperatures, keys.seeds, keys.positions, best, peak, drawn,
            vocab, SPAN=SPAN, BLOCK=BLOCK,
        )  # fmt: skip
        _walk[(batch,)](
            best, peak, drawn, rows.tokens, rows.parents, rows.starts, walk.tokens, walk.accepted, walk.lengths,
            walk.failed, splits, max_depth, SPLITS=triton.next_power_of_2(splits),
            BLOCK=triton.next_power_of_2(max(rows.limit, max_depth + 1)), num_warps=1,
        )  # fmt: skip
    return walk


@triton.jit
def _draw(
    logits: tl.tensor,  # [N, vocab]
    owner: tl.tensor,  # [N] int32
    depths: tl.tensor,  # [N] int32
    temperatures: tl.tensor,  # [B] float32
    seeds: tl.tensor,  # [B] int64
    positions: tl.tensor,  # [B] int64
    best: tl.tensor,  # [N, splits] float32, the highest noisy logit of the piece
    peak: tl.tensor,  # [N, splits] float32, its highest logit, +inf if one is NaN
    drawn: tl.tensor,  # [N, splits] int32, the token of `best`
    vocab: tl.int32,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    request = tl.load(owner + row)
    if request >= 0:
        temperature = tl.load(temperatures + request)
        key = row_key(tl.load(seeds + request), tl.load(positions + request) + tl.load(depths + row))
        source = logits + row.to(tl.int64) * vocab
        top, summit, choice = float("-inf"), float("-inf"), split * SPAN
        for offset in range(0, tl.minimum(SPAN, vocab - split * SPAN), BLOCK):
            column = split * SPAN + offset + tl.arange(0, BLOCK)
            x = tl.load(source + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            summit = tl.maximum(summit, tl.max(tl.where(x == x, x, float("inf")), axis=0))
            value = x
            if temperature > 0:
                value = tl.div_rn(x, temperature) + noise(key, column)
            here, place = tl.max(value, axis=0, return_indices=True)  # the first of equal ones
            choice = tl.where(here > top, split * SPAN + offset + place, choice)
            top = tl.maximum(top, here)
        out = row * tl.num_programs(1) + split
        tl.store(best + out, top)
        tl.store(peak + out, summit)
        tl.store(drawn + out, choice)


@triton.jit
def _walk(
    best: tl.tensor,  # [N, splits]
    peak: tl.tensor,  # [N, splits]
    drawn: tl.tensor,  # [N, splits]
    tokens: tl.tensor,  # [N] int64
    parents: tl.tensor,  # [N] int32
    starts: tl.tensor,  # [B + 1] int32
    out_tokens: tl.tensor,  # [B, max_depth + 1] int64
    accepted: tl.tensor,  # [B, max_depth] int32
    lengths: tl.tensor,  # [B] int32
    failed: tl.tensor,  # [B] bool
    splits: tl.int32,
    max_depth: tl.int32,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    request = tl.program_id(0).to(tl.int64)
    root, end = tl.load(starts + request), tl.load(starts + request + 1)
    lane = tl.arange(0, BLOCK)
    rows = root + 1 + lane
    parent = tl.load(parents + rows, mask=rows < end, other=-1)
    token = tl.load(tokens + rows, mask=rows < end, other=-1)
    piece = tl.arange(0, SPLITS)
    row, depth, finite = root, 0, root >= 0
    while row >= 0:
        place = row.to(tl.int64) * splits + piece
        summit = tl.max(tl.load(peak + place, mask=piece < splits, other=float("-inf")), axis=0)
        finite = (summit > float("-inf")) & (summit < float("inf"))
        value = tl.load(best + place, mask=piece < splits, other=float("-inf"))
        _, winner = tl.max(value, axis=0, return_indices=True)
        choice = tl.load(drawn + row.to(tl.int64) * splits + winner).to(tl.int64)
        tl.store(out_tokens + request * (max_depth + 1) + depth, choice, mask=finite)
        # rows of children are larger than their parent's, so the walk ends even if the tree is broken
        is_next = (rows > row) & (parent == row) & (token == choice)
        child = tl.max(tl.where(is_next, rows, -1), axis=0)
        row = tl.where(finite & (depth < max_depth), child, -1)
        tl.store(accepted + request * max_depth + depth, row - root - 1, mask=row >= 0)
        depth += (row >= 0).to(tl.int32)
    made = depth + finite.to(tl.int32)
    tl.store(lengths + request, depth)
    tl.store(failed + request, finite == 0)
    nothing = tl.full((BLOCK,), -1, tl.int32)
    tl.store(accepted + request * max_depth + lane, nothing, mask=(lane >= depth) & (lane < max_depth))
    beyond = (lane >= made) & (lane <= max_depth)
    tl.store(out_tokens + request * (max_depth + 1) + lane, nothing.to(tl.int64), mask=beyond)


def _aot() -> Iterator[KernelSpec]:
    partial = {"best": "*fp32", "peak": "*fp32", "drawn": "*i32"}
    keys = {"temperatures": "*fp32", "seeds": "*i64", "positions": "*i64"}
    for dtype in ("bf16", "fp32"):
        pointers = {"logits": f"*{dtype}", "owner": "*i32", "depths": "*i32", **keys, **partial}
        yield KernelSpec(
            f"verify_draw_{dtype}",
            _draw,
            pointers | {"vocab": "i32"},
            {"SPAN": SPAN, "BLOCK": BLOCK},
            aligned=frozenset({*pointers, "vocab"}),
        )
    tree = {"tokens": "*i64", "parents": "*i32", "starts": "*i32"}
    made = {"out_tokens": "*i64", "accepted": "*i32", "lengths": "*i32", "failed": "*i1"}
    for splits, block in ((4, 16), (16, 64), (32, 256)):
        yield KernelSpec(
            f"verify_walk_s{splits}_n{block}",
            _walk,
            partial | tree | made | {"splits": "i32", "max_depth": "i32"},
            {"SPLITS": splits, "BLOCK": block},
            num_warps=1,
            aligned=frozenset({*partial, *tree, *made}),
        )


AOT = tuple(_aot())
