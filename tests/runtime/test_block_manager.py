"""The conservation law under any sequence of operations, and that breaking it is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import IntegrityError, KVExhausted
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.sequence import Sequence


def sequence(index: int, prompt: int, new: int) -> Sequence:
    return Sequence(Request(f"s{index}", (1,) * prompt, SamplingParams(max_new_tokens=new)), text=None)  # type: ignore[arg-type]


operations = st.lists(
    st.tuples(st.sampled_from(["admit", "grow", "trim", "release"]), st.integers(0, 7), st.integers(1, 60))
)


@given(operations)
def test_blocks_are_conserved(steps):
    manager = BlockManager(blocks=20, block_size=4, headroom=6)
    live: dict[int, Sequence] = {}
    for kind, index, n in steps:
        if kind == "admit" and index not in live:
            s = sequence(index, n, 5)
            if manager.admit(s):
                live[index] = s
        elif index in live:
            s = live[index]
            if kind == "grow":
                if manager.blocks_for(n) <= s.reserved_blocks:
                    manager.grow(s, n)
                    assert len(s.blocks) * 4 >= n
                else:
                    with pytest.raises(KVExhausted):
                        manager.grow(s, n)
            elif kind == "trim":
                manager.trim(s, n)
                assert len(s.blocks) <= manager.blocks_for(n)
            elif kind == "release":
                manager.release(live.pop(index))
        manager.check_integrity(live.values())
    for s in live.values():
        manager.release(s)
    manager.check_integrity([])
    assert manager.used_share == 0.0


def test_broken_books_are_noticed():
    manager = BlockManager(blocks=8, block_size=4, headroom=0)
    a, b = sequence(0, 4, 4), sequence(1, 4, 4)
    assert manager.admit(a) and manager.admit(b)
    manager.grow(a, 8)
    manager.check_integrity([a, b])
    with pytest.raises(IntegrityError, match="partition"):
        manager.check_integrity([b])
    b.blocks.append(a.blocks[0])
    with pytest.raises(IntegrityError, match="partition"):
        manager.check_integrity([a, b])
    b.blocks.clear()
    a.kv_len = 9
    with pytest.raises(IntegrityError, match="9 tokens"):
        manager.check_integrity([a, b])
