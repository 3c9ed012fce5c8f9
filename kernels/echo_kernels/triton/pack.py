"""Turns a drafted forest into the flattened super-tree: choose the nodes, number the rows, write them.

Four launches (two where the caller chose the nodes) and one memset for the mask:
`_sortable` turns scores into integers in the same order, 0 for what may not be picked; `_threshold`
finds the integer of the last node picked in one program, eight bits a pass; `_place` numbers each
request's picks; `_emit` writes the rows at offsets that it sums from the requests' counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.device_interface import Candidates, TreeRows
from echo_kernels.triton.aot_spec import KernelSpec

THRESHOLD_BLOCK = 2048
THRESHOLD_WARPS = 16
TAIL = 256


def pack_top(candidates: Candidates, roots: Tensor, budget: Tensor, capacity: int, limit: int, levels: int) -> TreeRows:
    scores = candidates.scores
    batch, width = scores.shape
    sortable = scores.new_empty(batch, width, dtype=torch.int32)
    cut = scores.new_empty(2, dtype=torch.int32)
    if batch:
        block = triton.next_power_of_2(width)
        _sortable[(batch,)](
            scores, candidates.parents, sortable, width, limit, levels, BLOCK=block, num_warps=_warps(block)
        )
        _threshold[(1,)](
            sortable, budget, cut, batch, width, capacity, num_warps=THRESHOLD_WARPS,
            BLOCK=min(triton.next_power_of_2(batch * width), THRESHOLD_BLOCK),
        )  # fmt: skip
    return _rows(candidates, roots, None, sortable, cut, capacity, limit, levels)


def pack_mask(
    candidates: Candidates, roots: Tensor, picked: Tensor, capacity: int, limit: int, levels: int
) -> TreeRows:
    return _rows(candidates, roots, picked, None, None, capacity, limit, levels)


def _rows(
    candidates: Candidates,
    roots: Tensor,
    picked: Tensor | None,
    sortable: Tensor | None,
    cut: Tensor | None,
    capacity: int,
    limit: int,
    levels: int,
) -> TreeRows:
    batch, width = candidates.tokens.shape
    rows, block = capacity + batch, triton.next_power_of_2(width)
    places = roots.new_empty(batch, width, dtype=torch.int32)
    counts = roots.new_empty(batch, dtype=torch.int32)
    out = TreeRows(
        tokens=roots.new_empty(rows),
        parents=roots.new_empty(rows, dtype=torch.int32),
        depths=roots.new_empty(rows, dtype=torch.int32),
        owner=roots.new_empty(rows, dtype=torch.int32),
        mask=roots.new_zeros(rows, limit + 1, dtype=torch.bool),
        starts=roots.new_empty(batch + 1, dtype=torch.int32),
    )
    if batch:
        _place[(batch,)](picked, sortable, cut, places, counts, width, limit, BLOCK=block, num_warps=_warps(block))
    _emit[(batch + 1,)](
        candidates.tokens, candidates.parents, candidates.depths, roots, places, counts, out.tokens, out.parents,
        out.depths, out.owner, out.mask, out.starts, batch, width, capacity, limit, levels,
        BATCH=triton.next_power_of_2(max(batch, 1)), BLOCK=block, TAIL=TAIL, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """About four elements a thread, one warp to eight."""
    return min(max(block // 128, 1), 8)


@triton.jit
def _sortable(
    scores: tl.tensor,  # [B, width] float32
    parents: tl.tensor,  # [B, width] int64
    sortable: tl.tensor,  # [B, width] uint32 in an int32 buffer
    width: tl.int32,
    limit: tl.int32,
    levels: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    """Larger scores, larger integers; 0 for nodes that do not exist or are not among the request's `limit` best."""
    base = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    score = tl.load(scores + base + lane, mask=inside, other=float("-inf"))
    node = tl.where(inside, lane.to(tl.int64), -1)
    exists = inside
    for _ in range(levels):
        above = tl.load(scores + base + node, mask=node >= 0, other=0.0)
        exists = exists & (above > float("-inf"))  # false for NaN
        node = tl.load(parents + base + node, mask=node >= 0, other=-1)
    score = tl.where(score == 0.0, 0.0, score)  # both zeros are one number
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(exists, key, 0)
    last = tl.zeros((), tl.uint32)  # the limit-th largest, found bit by bit; 0 where there are fewer
    for step in tl.static_range(32):
        trial = last | (tl.full((), 1, tl.uint32) << (31 - step))
        last = tl.where(tl.sum((key >= trial).to(tl.int32), axis=0) >= limit, trial, last)
    tied = (key == last) & (key > 0)
    above_last = key > last
    place = tl.cumsum(tied.to(tl.int32), axis=0) + tl.sum(above_last.to(tl.int32), axis=0)
    kept = above_last | (tied & (place <= limit))
    tl.store(sortable + base + lane, tl.where(kept, key, 0).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _threshold(
    sortable: tl.tensor,  # [B, width]
    budget: tl.tensor,  # [1] int32
    cut: tl.tensor,  # [2] int32: the last integer picked, the last (node, request) picked among its equals
    batch: tl.int32,
    width: tl.int32,
    capacity: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    """Radix selection of the budget-th largest integer, then the place where its equals exhaust the budget."""
    count = batch * width
    wanted = tl.maximum(tl.minimum(tl.minimum(tl.load(budget), capacity), count), 0)
    lane, bins = tl.arange(0, BLOCK), tl.arange(0, 256)
    last = tl.zeros((), tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        tally = tl.zeros((256,), tl.int32)
        for offset in range(0, count, BLOCK):
            inside = offset + lane < count
            key = tl.load(sortable + offset + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
            if step > 0:
                inside = inside & ((key >> (shift + 8)) == last)
            tally += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.sum(tally, axis=0) - tl.cumsum(tally, axis=0) + tally
        digit = tl.max(tl.where(at_least >= wanted, bins, 0), axis=0)
        wanted -= tl.sum(tl.where(bins > digit, tally, 0), axis=0)
        last = (last << 8) | digit.to(tl.uint32)
    seen, end = 0, -1
    for offset in range(0, count, BLOCK):
        place = offset + lane  # node by node
        at = (place % batch) * width + place // batch
        key = tl.load(sortable + at, mask=place < count, other=0).to(tl.uint32, bitcast=True)
        tied = (key == last) & (key > 0)
        order = seen + tl.cumsum(tied.to(tl.int32), axis=0)
        end = tl.maximum(end, tl.max(tl.where(tied & (order <= wanted), place, -1), axis=0))
        seen += tl.sum(tied.to(tl.int32), axis=0)
    tl.store(cut, last.to(tl.int32, bitcast=True))
    tl.store(cut + 1, end)


@triton.jit
def _place(
    picked: tl.tensor,  # [B, width] bool, or None: by the cut
    sortable: tl.tensor,  # [B, width]
    cut: tl.tensor,  # [2]
    places: tl.tensor,  # [B, width] int32, index among the request's picks; -1 where not picked
    counts: tl.tensor,  # [B] int32
    width: tl.int32,
    limit: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    base = request.to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    if picked is not None:
        chosen = tl.load(picked + base + lane, mask=inside, other=0) != 0
    else:
        key = tl.load(sortable + base + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
        last = tl.load(cut).to(tl.uint32, bitcast=True)
        within = lane * tl.num_programs(0) + request <= tl.load(cut + 1)
        chosen = (key > last) | ((key == last) & (key > 0) & within)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    chosen = chosen & (place < limit)
    tl.store(places + base + lane, tl.where(chosen, place, -1), mask=inside)
    tl.store(counts + request, tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit
def _emit(
    tokens: tl.tensor,  # [B, width] int64
    parents: tl.tensor,  # [B, width] int64
    depths: tl.tensor,  # [width] int64
    roots: tl.tensor,  # [B] int64
    places: tl.tensor,  # [B, width] int32
    counts: tl.tensor,  # [B] int32
    out_tokens: tl.tensor,  # [rows] int64
    out_parents: tl.tensor,  # [rows] int32
    out_depths: tl.tensor,  # [rows] int32
    out_owner: tl.tensor,  # [rows] int32
    mask: tl.tensor,  # [rows, limit + 1] bool, zero
    starts: tl.tensor,  # [B + 1] int32
    batch: tl.int32,
    width: tl.int32,
    capacity: tl.int32,
    limit: tl.int32,
    levels: tl.int32,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """One program a request; the last program fills the padding."""
    request = tl.program_id(0)
    others = tl.arange(0, BATCH)
    before = tl.sum(tl.load(counts + others, mask=others < tl.minimum(request, batch), other=0), axis=0)
    root = tl.minimum(before, capacity) + request
    tl.store(starts + request, root)
    if request < batch:
        room = capacity + request - root
        base = request.to(tl.int64) * width
        tl.store(out_tokens + root, tl.load(roots + request))
        tl.store(out_parents + root, root)
        tl.store(out_depths + root, 0)
        tl.store(out_owner + root, request)
        columns = limit + 1
        tl.store(mask + root.to(tl.int64) * columns, 1)
        lane = tl.arange(0, BLOCK)
        place = tl.load(places + base + lane, mask=lane < width, other=-1)
        kept = (place >= 0) & (place < room)
        row = root + 1 + place
        parent = tl.load(parents + base + lane, mask=kept, other=-1)
        above = tl.load(places + base + parent, mask=kept & (parent >= 0), other=-1)
        tl.store(out_tokens + row, tl.load(tokens + base + lane, mask=kept, other=0), mask=kept)
        tl.store(out_parents + row, root + 1 + above, mask=kept)
        tl.store(out_depths + row, (tl.load(depths + lane, mask=kept, other=0) + 1).to(tl.int32), mask=kept)
        tl.store(out_owner + row, request + tl.zeros((BLOCK,), tl.int32), mask=kept)
        line = mask + row.to(tl.int64) * columns
        seen = tl.full((BLOCK,), 1, tl.int1)
        tl.store(line, seen, mask=kept)
        node = tl.where(kept, lane.to(tl.int64), -1)
        for _ in range(levels):
            at = tl.load(places + base + node, mask=node >= 0, other=-1)
            tl.store(line + 1 + at, seen, mask=at >= 0)
            node = tl.load(parents + base + node, mask=node >= 0, other=-1)
    else:
        tail = tl.arange(0, TAIL)
        for offset in range(root, capacity + batch, TAIL):
            row = offset + tail
            padding = row < capacity + batch
            tl.store(out_tokens + row, tl.zeros((TAIL,), tl.int64), mask=padding)
            tl.store(out_parents + row, tl.full((TAIL,), -1, tl.int32), mask=padding)
            tl.store(out_depths + row, tl.zeros((TAIL,), tl.int32), mask=padding)
            tl.store(out_owner + row, tl.full((TAIL,), -1, tl.int32), mask=padding)


def _aot() -> Iterator[KernelSpec]:
    sizes = dict.fromkeys(("batch", "width", "capacity", "limit", "levels"), "i32")
    rows = {
        "out_tokens": "*i64", "out_parents": "*i32", "out_depths": "*i32",
        "out_owner": "*i32", "mask": "*i1", "starts": "*i32",
    }  # fmt: skip
    keys = {"sortable": "*i32", "cut": "*i32"}

    def spec(
        name: str, kernel: object, pointers: dict[str, str], wanted: str, constants: dict, warps: int
    ) -> KernelSpec:
        signature = pointers | {size: sizes[size] for size in wanted.split()}
        return KernelSpec(name, kernel, signature, constants, num_warps=warps, aligned=frozenset(pointers))

    yield spec(
        "pack_threshold", _threshold, keys | {"budget": "*i32"}, "batch width capacity",
        {"BLOCK": THRESHOLD_BLOCK}, THRESHOLD_WARPS,
    )  # fmt: skip
    for block in (64, 512, 2048):
        warps = _warps(block)
        scored = {"scores": "*fp32", "parents": "*i64", "sortable": "*i32"}
        yield spec(f"pack_sortable_{block}", _sortable, scored, "width limit levels", {"BLOCK": block}, warps)
        numbered = {"places": "*i32", "counts": "*i32"}
        given = {"sortable": None, "cut": None, "BLOCK": block}
        yield spec(
            f"pack_place_{block}", _place, keys | numbered, "width limit", {"picked": None, "BLOCK": block}, warps
        )
        yield spec(f"pack_place_mask_{block}", _place, {"picked": "*i1"} | numbered, "width limit", given, warps)
        forest = {"tokens": "*i64", "parents": "*i64", "depths": "*i64", "roots": "*i64"}
        constants = {"BATCH": 256, "BLOCK": block, "TAIL": TAIL}
        yield spec(
            f"pack_emit_{block}", _emit, forest | numbered | rows, "batch width capacity limit levels", constants, warps
        )


AOT = tuple(_aot())
