"""The likeliest token: torch's answer, the first of equals, and NaN never overlooked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = (1, 7, 16, 33, 511, 512, 513, 1500)


@pytest.mark.parametrize("vocab", SIZES)
def test_equals_torch(ops, dtype, vocab):
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9, vocab, generator=g).to(dtype)
    rows = torch.tensor([8, 0, 3, 3])
    tokens, best = ops.best_token(logits, rows)
    assert torch.equal(best, logits[rows].float().amax(1))
    assert torch.equal(tokens, logits[rows].float().argmax(1))


@settings(max_examples=60)
@given(st.integers(1, 1200), st.data())
def test_the_first_of_equals_wins(reference, cpp, vocab, data):
    places = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=4))
    logits = torch.full((1, vocab), -3.0)
    logits[0, places] = -2.0
    for ops in (reference, cpp):
        tokens, best = ops.best_token(logits, torch.tensor([0]))
        assert (tokens.item(), best.item()) == (min(places), -2.0)


@pytest.mark.parametrize("place", [0, 15, 16, 511, 512, 1029])
def test_nan_is_seen_wherever_it_lies(ops, dtype, place):
    logits = torch.randn(3, 1030).to(dtype)
    logits[1, place] = float("nan")
    tokens, best = ops.best_token(logits, torch.arange(3))
    assert best.isnan().tolist() == [False, True, False]
    assert tokens[1] == 0


def test_infinities_are_numbers(ops):
    logits = torch.zeros(2, 40)
    logits[0, 39], logits[1] = float("inf"), float("-inf")
    tokens, best = ops.best_token(logits, torch.arange(2))
    assert tokens.tolist() == [39, 0] and best.tolist() == [float("inf"), float("-inf")]


def test_bad_arguments_are_refused(ops):
    logits = torch.zeros(2, 8)
    with pytest.raises(IndexError):
        ops.best_token(logits, torch.tensor([2]))
    with pytest.raises(TypeError, match="rows"):
        ops.best_token(logits, torch.zeros(1))
    with pytest.raises(ValueError, match="rows"):
        ops.best_token(logits, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocabulary"):
        ops.best_token(torch.zeros(2, 0), torch.tensor([0]))
