"""The count of launches follows the runtime that it counts: every case of a small step can be traced."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.kernels.launches import Shape, step_entries, totals


def test_every_case_is_traced_and_fused_ones_do_not_wait():
    shape = Shape(vocab=512, draft_vocab=256, hidden=256, inner=512, context=128)
    entries = step_entries(shape)
    counted = totals(entries, shape)
    assert {entry["name"] for entry in entries} >= {"tree_attention", "gate_topk", "choose_and_flatten", "verify_tree"}
    assert counted["after"]["waits"] == 0 < counted["before"]["waits"]
