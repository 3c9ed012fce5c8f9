"""The rules that hold of every backend, asked of the Triton kernels: the same functions that ask the CPU backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from echo_kernels import Ops, ops_for
from tests import tiny
from tests.kernels import test_kernels_attention as attention
from tests.kernels import test_kernels_best_token as best_token
from tests.kernels import test_kernels_checks as checks
from tests.kernels import test_kernels_compact as compact
from tests.kernels import test_kernels_gumbel as gumbel
from tests.kernels import test_kernels_norm as norm
from tests.runtime.test_engine import Erratic, requests, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
RULES: list[Callable] = [
    attention.test_buffers_may_be_wider_than_the_batch_needs,
    attention.test_a_row_that_sees_nothing_is_zero,
    attention.test_no_query_rows_at_all,
    attention.test_nan_in_a_query_reaches_its_row_only,
    attention.test_nan_in_a_key_reaches_the_rows_that_see_it,
    attention.test_visible_logits_of_minus_infinity_are_not_hidden,
    attention.test_large_logits_do_not_overflow,
    best_token.test_infinities_are_numbers,
    checks.test_the_same_calls_unspoiled_pass,
    compact.test_overlapping_rows_are_gathered_first,
    compact.test_nothing_to_move,
    gumbel.test_floats_are_exact_to_float32,
    norm.test_rms_norm_matches_torch,
    norm.test_rms_norm_rounds_before_the_weight,
    norm.test_add_rms_norm_updates_the_residual_in_place,
    norm.test_norm_propagates_nan_and_handles_zero,
    norm.test_silu_mul_extremes,
    norm.test_silu_mul_matches_torch,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("test_"))
def test_rule(triton_ops: Ops, rule: Callable) -> None:
    if "dtype" not in inspect.signature(rule).parameters:
        rule(triton_ops)
        return
    for dtype in (torch.float32, torch.bfloat16):
        rule(triton_ops, dtype)


@pytest.mark.parametrize("name", list(attention.SHAPES))
def test_attention_is_torchs(triton_ops: Ops, dtype: torch.dtype, name: str) -> None:
    case = attention.build(attention.SHAPES[name], dtype, dim=16)
    attention.close(case.run(triton_ops), case.torch_attention(), dtype)


def test_the_engine_gives_the_same_tokens(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, drafts, trees and compaction of a tiny float32 model: every operation in its place."""
    todo = requests(2, 0.8, tokens=8)
    monkeypatch.setenv("ECHO_KERNELS", "reference")
    expected = run(tiny.engine(tmp_path, prefill_chunk=16), Erratic(0), todo)
    monkeypatch.setenv("ECHO_KERNELS", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert ops_for(device).name == "triton"
    controller = Erratic(0)
    assert run(tiny.engine(tmp_path, prefill_chunk=16, device=device), controller, todo) == expected
    assert sum(report.accepted for report in controller.reports) > 0, "no node was accepted: nothing was compacted"
