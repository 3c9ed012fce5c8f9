"""Drafts one level: top-k of the drafter's log-softmax, path scores, the next expansion and the gate.

Two launches. `_scan` reads the logits once, a row and a piece of the vocabulary a program, and leaves
each piece's maximum, sum of exponentials and top candidates. `_merge` has one program a request and
does the rest on a few hundred numbers. Requests that a gate stopped read no logits at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels import reference
from echo_kernels.device_interface import MAX_FAN, Level
from echo_kernels.triton.aot_spec import KernelSpec

SPAN = 4096
"""Vocabulary entries a program: they stay in registers while the top ones are taken."""


def gate_topk(
    logits: Tensor,
    front_scores: Tensor,
    front_nodes: Tensor,
    alive: Tensor,
    thresholds: Tensor,
    vocabulary: Tensor | None,
    fan: int,
    width: int,
) -> Level:
    rows, vocab = logits.shape
    batch, front = front_scores.shape
    span = min(SPAN, triton.next_power_of_2(vocab))
    splits = triton.cdiv(vocab, span)
    peaks, totals = logits.new_empty(2, rows, splits, dtype=torch.float32).unbind(0)
    values = logits.new_empty(rows, splits * fan, dtype=torch.float32)
    places = logits.new_empty(rows, splits * fan, dtype=torch.int32)
    level = Level(
        tokens=front_nodes.new_empty(batch, front * fan),
        scores=front_scores.new_empty(batch, front * fan),
        parents=front_nodes.new_empty(batch, front * fan),
        best=front_nodes.new_empty(batch, width),
        best_scores=front_scores.new_empty(batch, width),
        alive=torch.empty_like(alive),
    )
    if batch:
        _scan[(rows, splits)](
            logits, alive, peaks, totals, values, places, vocab, front, FAN=fan, SPAN=span, num_warps=8
        )
        _merge[(batch,)](
            peaks, totals, values, places, front_scores, front_nodes, alive, thresholds, vocabulary, level.tokens,
            level.scores, level.parents, level.best, level.best_scores, level.alive, splits, front, FAN=fan,
            WIDTH=width, FRONT=triton.next_power_of_2(front), FANS=triton.next_power_of_2(fan),
            POOL=triton.next_power_of_2(splits * fan), SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return level


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The level below one root a row, whose score is 0."""
    if k > MAX_FAN:
        return reference.top_tokens(logits, k)
    roots = logits.new_zeros(len(logits), 1, dtype=torch.float32)
    everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    level = gate_topk(logits, roots, roots.long(), everyone, roots.view(-1), None, k, 1)
    return level.scores, level.tokens


@triton.jit
def _scan(
    logits: tl.tensor,  # [B * front, vocab]
    alive: tl.tensor,  # [B] bool
    peaks: tl.tensor,  # [B * front, splits] float32 maximum, +inf if a logit is NaN
    totals: tl.tensor,  # [B * front, splits] float32 sum of exp(logit - peak)
    values: tl.tensor,  # [B * front, splits, FAN] float32
    places: tl.tensor,  # [B * front, splits, FAN] int32 columns
    vocab: tl.int32,
    front: tl.int32,
    FAN: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(alive + row // front):
        lane = tl.arange(0, SPAN)
        column = split * SPAN + lane
        x = tl.load(logits + row.to(tl.int64) * vocab + column, mask=column < vocab, other=float("-inf"))
        x = x.to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        peak = tl.max(x, axis=0)
        out = row * tl.num_programs(1) + split
        tl.store(peaks + out, peak)
        usable = (peak > float("-inf")) & (peak < float("inf"))
        tl.store(totals + out, tl.sum(tl.exp(x - tl.where(usable, peak, 0.0)), axis=0))
        for i in tl.static_range(FAN):
            value, place = tl.max(x, axis=0, return_indices=True)  # the first of equal ones
            tl.store(values + out * FAN + i, value)
            tl.store(places + out * FAN + i, split * SPAN + place)
            x = tl.where(lane == place, float("-inf"), x)


@triton.jit
def _merge(
    peaks: tl.tensor,  # [B * front, splits]
    totals: tl.tensor,  # [B * front, splits]
    values: tl.tensor,  # [B * front, splits * FAN]
    places: tl.tensor,  # [B * front, splits * FAN]
    front_scores: tl.tensor,  # [B, front] float32
    front_nodes: tl.tensor,  # [B, front] int64
    alive: tl.tensor,  # [B] bool
    thresholds: tl.tensor,  # [B] float32
    vocabulary: tl.tensor,  # [vocab] int64, or None: a column is its own token
    out_tokens: tl.tensor,  # [B, front * FAN] int64
    out_scores: tl.tensor,  # [B, front * FAN] float32
    out_parents: tl.tensor,  # [B, front * FAN] int64
    best: tl.tensor,  # [B, WIDTH] int64
    best_scores: tl.tensor,  # [B, WIDTH] float32
    out_alive: tl.tensor,  # [B] bool
    splits: tl.int32,
    front: tl.int32,
    FAN: tl.constexpr,
    WIDTH: tl.constexpr,
    FRONT: tl.constexpr,
    FANS: tl.constexpr,
    POOL: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    request = tl.program_id(0).to(tl.int64)
    drafted = tl.load(alive + request)
    f = tl.arange(0, FRONT)
    here = (f < front) & drafted
    row = request * front + f
    total = _log_total(peaks, totals, row, here, splits, SPLITS)
    usable = here & (total < float("inf")) & (total > float("-inf"))
    total = tl.where(usable, total, 0.0)
    score = tl.load(front_scores + row, mask=here, other=0.0)
    node = tl.load(front_nodes + row, mask=here, other=0)
    slot = tl.arange(0, POOL)
    pool_at = row[:, None] * (splits * FAN) + slot[None, :]
    inside = here[:, None] & (slot < splits * FAN)[None, :]
    pool = tl.load(values + pool_at, mask=inside, other=float("-inf"))  # pieces in order, each sorted
    rank = tl.arange(0, FANS)
    level = tl.full((FRONT, FANS), float("-inf"), tl.float32)
    for i in tl.static_range(FAN):
        value, place = tl.max(pool, axis=1, return_indices=True)
        path = tl.where(usable, score + tl.minimum(value - total, 0.0), float("-inf"))
        there = path > float("-inf")
        column = tl.load(places + row * (splits * FAN) + place, mask=there, other=0)
        token = column.to(tl.int64)
        if vocabulary is not None:
            token = tl.load(vocabulary + column, mask=there, other=0)
        out = row * FAN + i
        tl.store(out_tokens + out, token, mask=f < front)
        tl.store(out_scores + out, path, mask=f < front)
        tl.store(out_parents + out, tl.where(there, node, 0), mask=f < front)
        level = tl.where((rank == i)[None, :], path[:, None], level)
        pool = tl.where(slot[None, :] == place[:, None], float("-inf"), pool)
    flat = tl.reshape(level, (FRONT * FANS,))
    spot = tl.arange(0, FRONT * FANS)
    first = float("-inf")
    for j in tl.static_range(WIDTH):
        value, place = tl.max(flat, axis=0, return_indices=True)
        at = tl.where(value > float("-inf"), place // FANS * FAN + place % FANS, 0)
        tl.store(best + request * WIDTH + j, at.to(tl.int64))
        tl.store(best_scores + request * WIDTH + j, value)
        first = tl.maximum(first, value)
        flat = tl.where(spot == place, float("-inf"), flat)
    tl.store(out_alive + request, drafted & (tl.exp(first) >= tl.load(thresholds + request)))


@triton.jit
def _log_total(
    peaks: tl.tensor, totals: tl.tensor, row: tl.tensor, here: tl.tensor, splits: tl.int32, SPLITS: tl.constexpr
) -> tl.tensor:
    """The logarithm of the sum of exponentials of each row, not finite where its logits are not usable."""
    piece = tl.arange(0, SPLITS)
    at = row[:, None] * splits + piece[None, :]
    inside = here[:, None] & (piece < splits)[None, :]
    peak = tl.load(peaks + at, mask=inside, other=float("-inf"))
    highest = tl.max(peak, axis=1)
    usable = (highest > float("-inf")) & (highest < float("inf"))
    scale = tl.exp(tl.where(usable[:, None], peak, 0.0) - tl.where(usable, highest, 0.0)[:, None])
    total = tl.sum(tl.load(totals + at, mask=inside, other=0.0) * scale, axis=1)
    return highest + tl.log(tl.where(usable, total, 1.0))


def _aot() -> Iterator[KernelSpec]:
    partial = {"peaks": "*fp32", "totals": "*fp32", "values": "*fp32", "places": "*i32"}
    for dtype in ("bf16", "fp32"):
        for fan in (4, 8):
            pointers = {"logits": f"*{dtype}", "alive": "*i1", **partial}
            yield KernelSpec(
                f"gate_scan_{dtype}_k{fan}",
                _scan,
                pointers | {"vocab": "i32", "front": "i32"},
                {"FAN": fan, "SPAN": SPAN},
                num_warps=8,
                aligned=frozenset({*pointers, "vocab"}),
            )
    front = {"front_scores": "*fp32", "front_nodes": "*i64", "alive": "*i1", "thresholds": "*fp32"}
    made = {
        "out_tokens": "*i64", "out_scores": "*fp32", "out_parents": "*i64",
        "best": "*i64", "best_scores": "*fp32", "out_alive": "*i1",
    }  # fmt: skip
    for width, splits in ((4, 8), (8, 8), (8, 32)):
        pointers = partial | front | {"vocabulary": "*i64"} | made
        shape = {"FAN": width, "WIDTH": width, "FRONT": width, "FANS": width, "POOL": width * splits}
        yield KernelSpec(
            f"gate_merge_k{width}_s{splits}",
            _merge,
            pointers | {"splits": "i32", "front": "i32"},
            shape | {"SPLITS": splits},
            aligned=frozenset(pointers),
        )


AOT = tuple(_aot())
