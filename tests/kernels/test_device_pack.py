"""Choosing and packing nodes on the device: Triton against the reference, both against the controllers' rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_kernels.device_interface import Candidates, TreeRows
from echo_kernels.device_ops import DeviceOps
from echo_rl.contracts import Forest, Selection
from echo_rl.controllers.selection import global_top_k, pack
from tests.kernels.device_cases import REFERENCE, TRITON, budget, closed, forest, same, with_holes

both = pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
shapes = st.tuples(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans())


def roots_of(candidates: Candidates) -> torch.Tensor:
    return torch.arange(len(candidates.tokens)) + 1000


def as_forest(c: Candidates) -> Forest:
    return Forest(c.tokens, c.parents, c.depths, c.scores, torch.zeros(len(c.tokens), dtype=torch.int64))


def check_selection(rows: TreeRows, selection: Selection, roots: torch.Tensor) -> None:
    """The packed rows hold this selection, a root before each request's nodes, each seeing its ancestors."""
    starts = rows.starts.tolist()
    assert starts == [0, *(selection.counts + 1).cumsum(0).tolist()]
    offset = 0
    for b, (root, end) in enumerate(pairwise(starts)):
        count = end - root - 1
        mine = slice(offset, offset + count)
        offset += count
        assert rows.tokens[root:end].tolist() == [int(roots[b]), *selection.tokens[mine].tolist()]
        assert (rows.parents[root:end] - root).tolist() == [0, *(selection.parents[mine] + 1).tolist()]
        assert rows.depths[root:end].tolist() == [0, *(selection.depths[mine] + 1).tolist()]
        assert (rows.owner[root:end] == b).all()
        seen: list[set[int]] = [{0}]
        for node, parent in enumerate(selection.parents[mine].tolist()):
            seen.append(seen[parent + 1] | {node + 1})
        assert [set(row.nonzero().flatten().tolist()) for row in rows.mask[root:end]] == seen
    assert (rows.owner[starts[-1] :] == -1).all() and not rows.mask[starts[-1] :].any()


@given(shapes, st.integers(0, 70), st.integers(0, 80), st.integers(0, 20), st.booleans())
@settings(max_examples=40)
def test_triton_matches_the_reference(shape, k, capacity, limit, holes):
    seed, batch, depth, width, coarse = shape
    candidates = forest(seed, batch, depth, width, coarse)
    if holes:
        candidates = with_holes(candidates, seed)
    arguments = (candidates, roots_of(candidates), budget(k), capacity, limit, depth)
    same(TRITON.pack_top(*arguments), REFERENCE.pack_top(*arguments))


@given(shapes, st.integers(0, 70), st.integers(1, 20), st.booleans())
@settings(max_examples=25)
@both
def test_picks_what_the_controllers_pick(ops: DeviceOps, shape, k, limit, holes):
    seed, batch, depth, width, coarse = shape
    candidates = forest(seed, batch, depth, width, coarse)
    if holes:
        candidates = closed(with_holes(candidates, seed))
    roots = roots_of(candidates)
    whole = as_forest(candidates)
    expected = pack(whole, global_top_k(whole, k, limit))
    check_selection(ops.pack_top(candidates, roots, budget(k), 80, limit, depth), expected, roots)


@given(shapes, st.integers(0, 30))
@settings(max_examples=25)
@both
def test_packs_any_closed_mask(ops: DeviceOps, shape, k):
    seed, batch, depth, width, coarse = shape
    candidates = forest(seed, batch, depth, width, coarse)
    mask = global_top_k(as_forest(candidates), k)
    roots = roots_of(candidates)
    rows = ops.pack_mask(candidates, roots, mask, 40, 40, depth)
    check_selection(rows, pack(as_forest(candidates), mask), roots)


@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 6))
@settings(max_examples=25)
def test_what_does_not_fit_is_dropped_from_the_end(seed, capacity, limit):
    candidates = forest(seed, 3, 3, 3)
    mask = torch.ones(candidates.tokens.shape, dtype=torch.bool)
    arguments = (candidates, roots_of(candidates), mask, capacity, limit, 3)
    rows = TRITON.pack_mask(*arguments)
    same(rows, REFERENCE.pack_mask(*arguments))
    assert int(rows.starts[-1]) == 3 + min(capacity, 3 * limit)
    inside = rows.owner >= 0
    assert (rows.parents[inside] <= torch.arange(len(inside))[inside]).all()


def test_a_forest_larger_than_one_tile():
    """2,460 nodes: the threshold is found over several tiles, and its ties are cut in the middle of one."""
    candidates = forest(5, 60, 3, 4, coarse=True)
    arguments = (candidates, roots_of(candidates), budget(777), 800, 30, 3)
    rows = TRITON.pack_top(*arguments)
    same(rows, REFERENCE.pack_top(*arguments))
    assert int(rows.starts[-1]) == 60 + 777


@both
def test_no_request_at_all(ops: DeviceOps):
    empty = Candidates(*(t[:0] if t.dim() == 2 else t for t in vars(forest(0, 1, 2, 2)).values()))
    rows = ops.pack_top(empty, torch.empty(0, dtype=torch.int64), budget(3), 4, 4, 2)
    assert rows.starts.tolist() == [0] and (rows.owner == -1).all() and len(rows.owner) == 4


def test_the_sign_of_zero_does_not_break_a_tie():
    candidates = forest(1, 2, 1, 2)
    candidates.scores.copy_(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]))
    rows = TRITON.pack_top(candidates, roots_of(candidates), budget(2), 4, 4, 1)
    assert rows.starts.tolist() == [0, 2, 4]  # each request's first node


BAD = [
    ("budget dtype", TypeError, "budget", {"budget": torch.tensor([3])}),
    ("budget shape", ValueError, "budget", {"budget": torch.zeros(2, dtype=torch.int32)}),
    ("roots", ValueError, "roots", {"roots": torch.zeros(3, dtype=torch.int64)}),
    ("capacity", ValueError, "capacity", {"capacity": -1}),
]


@pytest.mark.parametrize(("error", "message", "changed"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_refuses(error, message, changed):
    candidates = forest(0, 2, 2, 2)
    arguments = {"roots": roots_of(candidates), "budget": budget(3), "capacity": 4, "limit": 4, "levels": 2} | changed
    with pytest.raises(error, match=message):
        REFERENCE.pack_top(candidates, **arguments)
