"""Row moves within the caches."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels import Ops


def pools() -> list[Tensor]:
    return [torch.randn(3, 40, 2, 8), torch.randn(3, 40, 2, 8).bfloat16(), torch.arange(80).view(2, 40)]


def test_overlapping_rows_are_gathered_first(ops: Ops) -> None:
    """A shift by one and a swap: in-order copying would smear the first row."""
    for src, dst in [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 9], [9, 4]), ([5], [5])]:
        before, after = pools(), []
        after = [p.clone() for p in before]
        ops.compact_kv(after, torch.tensor(src), torch.tensor(dst))
        for old, new in zip(before, after, strict=True):
            expected = old.clone()
            for s, d in zip(src, dst, strict=True):
                expected[:, d] = old[:, s]
            assert torch.equal(new, expected)


def test_nothing_to_move(ops: Ops) -> None:
    pool = torch.randn(2, 4, 3)
    before = pool.clone()
    none = torch.empty(0, dtype=torch.int64)
    ops.compact_kv([pool], none, none)
    ops.compact_kv([], none, none)
    assert torch.equal(pool, before)


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=40, unique_by=lambda pair: pair[1]))
@settings(max_examples=40)
def test_cpp_matches_reference(cpp: Ops, reference: Ops, moves: list[tuple[int, int]]) -> None:
    src, dst = torch.tensor(moves, dtype=torch.int64).view(-1, 2).T.contiguous()
    a = pools()
    b = [p.clone() for p in a]
    cpp.compact_kv(a, src, dst)
    reference.compact_kv(b, src, dst)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
