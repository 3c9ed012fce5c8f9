"""The likeliest tokens: the reference's answer on every backend, the lower of equals first, spoilt rows never used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels import Ops

NOTHING, NAN = float("-inf"), float("nan")
VOCABULARIES = st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 1000, 4096, 5000]))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


def logits_of(seed: int, rows: int, vocab: int, dtype: torch.dtype, holes: float = 0.1) -> Tensor:
    """Random logits (in bfloat16 many tie), some -inf."""
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(rows, vocab, generator=g) + 10 * torch.randn(rows, 1, generator=g)
    return x.masked_fill_(torch.rand(rows, vocab, generator=g) < holes, NOTHING).to(dtype)


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=2e-6, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(0, 9), VOCABULARIES, st.integers(1, 20), FLOATS)
@settings(max_examples=80)
def test_cpp_is_the_reference(reference: Ops, cpp: Ops, seed, rows, vocab, k, dtype):
    logits = logits_of(seed, rows, vocab, dtype)
    close(cpp.top_tokens(logits, min(k, vocab)), reference.top_tokens(logits, min(k, vocab)))


@given(st.integers(0, 2**31), st.integers(0, 4), VOCABULARIES, st.sampled_from([1, 3, 8, 65]), FLOATS)
@settings(max_examples=30)
def test_triton_is_the_reference(triton_ops: Ops, reference: Ops, seed, rows, vocab, k, dtype):
    logits = logits_of(seed, rows, vocab, dtype)
    close(triton_ops.top_tokens(logits, min(k, vocab)), reference.top_tokens(logits, min(k, vocab)))


def test_is_torchs_log_softmax(ops: Ops, dtype):
    logits = logits_of(1, 6, 777, dtype, holes=0.0)
    log_probs, tokens = ops.top_tokens(logits, 5)
    expected = logits.float().log_softmax(1)
    torch.testing.assert_close(log_probs, expected.topk(5).values, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(log_probs, expected.gather(1, tokens), rtol=2e-6, atol=1e-5)


@settings(max_examples=60)
@given(st.integers(1, 1200), st.integers(1, 6), st.data())
def test_the_lower_of_equals_comes_first(reference: Ops, cpp: Ops, vocab, k, data):
    places = data.draw(st.lists(st.integers(0, vocab - 1), max_size=8, unique=True))
    logits = torch.full((1, vocab), -3.0)
    logits[0, places] = -2.0
    others = [token for token in range(min(vocab, 20)) if token not in places]
    for ops in (reference, cpp):
        assert ops.top_tokens(logits, min(k, vocab))[1][0].tolist() == (sorted(places) + others)[: min(k, vocab)]


@pytest.mark.parametrize("place", [0, 15, 16, 127, 128, 1029])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_spoilt_row_offers_nothing(ops: Ops, dtype, place, value):
    logits = torch.randn(3, 1030).to(dtype)
    logits[1, place] = value
    log_probs, tokens = ops.top_tokens(logits, 2)
    assert (log_probs[1] == NOTHING).all() and tokens[1].tolist() == [0, 0]
    assert log_probs[[0, 2]].isfinite().all()


def test_what_is_impossible_is_token_0(ops: Ops):
    logits = torch.full((2, 400), NOTHING)
    logits[0, 300] = 7.0
    log_probs, tokens = ops.top_tokens(logits, 3)
    assert log_probs.tolist() == [[0.0, NOTHING, NOTHING], [NOTHING] * 3]
    assert tokens.tolist() == [[300, 0, 0], [0, 0, 0]]


def test_extreme_logits_do_not_overflow(ops: Ops):
    logits = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3e38, -3e38]])
    log_probs, tokens = ops.top_tokens(logits, 3)
    assert log_probs.isnan().sum() == 0 and (log_probs <= 0).all()
    assert tokens.tolist() == [[0, 2, 0], [0, 1, 2]] and log_probs[0, 2] == NOTHING


def test_bad_arguments_are_refused(ops: Ops):
    with pytest.raises(ValueError, match="k is 0"):
        ops.top_tokens(torch.zeros(2, 8), 0)
    with pytest.raises(ValueError, match="k is 9"):
        ops.top_tokens(torch.zeros(2, 8), 9)
    with pytest.raises(TypeError, match="logits"):
        ops.top_tokens(torch.zeros(2, 8, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="matrix"):
        ops.top_tokens(torch.zeros(8, 2).T, 1)
