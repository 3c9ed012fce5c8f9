"""Position-keyed sampling draws from the right distribution, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from echo_rl.contracts import SamplingParams
from echo_rl.runtime.sampling import draw


def frequencies(logits: torch.Tensor, n: int = 6000, **params: float) -> torch.Tensor:
    rows = logits.expand(n, -1)
    tokens = draw(rows.contiguous(), range(n), [SamplingParams(seed=7, **params)] * n, list(range(n))).tokens
    return torch.bincount(tokens, minlength=logits.shape[0]) / n


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -3.0])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [0, 4]),
        ({"top_p": 0.6}, [0, 4]),
        ({"top_k": 4, "top_p": 0.9}, [0, 4, 1]),
    ],
)
def test_the_distribution_is_the_filtered_softmax(params, kept):
    expected = torch.zeros(6)
    expected[kept] = (LOGITS[kept] / 0.7).softmax(0)
    found = frequencies(LOGITS, temperature=0.7, **params)
    assert (found - expected).abs().max() < 0.025
    assert found[expected == 0].sum() == 0


def test_a_draw_depends_on_its_own_row_alone():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 50, generator=g)
    params = [SamplingParams(temperature=t, seed=s) for s, t in enumerate((0.0, 0.5, 1.0, 2.0, 0.0))]
    together = draw(logits, range(5), params, [3, 4, 5, 6, 7]).tokens.tolist()
    alone = [int(draw(logits, [i], [params[i]], [3 + i]).tokens) for i in range(5)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


@pytest.mark.parametrize("temperature", [1e-50, 1e-40, 9e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9}])
def test_the_smallest_temperatures_are_greedy(temperature, filters):
    logits = 40 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=temperature, **filters)
    assert draw(logits, range(4), [params] * 4, range(4)).tokens.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_flagged(bad):
    logits = torch.zeros(2, 8)
    logits[1, 3] = bad
    assert draw(logits, [0, 1], [SamplingParams()] * 2, [0, 0]).best.isfinite().tolist() == [True, False]
