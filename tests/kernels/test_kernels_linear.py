"""Products with a packed matrix: torch's numbers, and rows that do not know each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def packs(cpp):
    """The C++ backend, on processors whose instructions it needs."""
    if cpp.pack_weight(torch.zeros(32, 2, dtype=torch.bfloat16)) is None:
        pytest.skip("this processor has no AVX512-BF16 (or has AMX): torch's products are used")
    return cpp


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_panels_hold_what_the_layout_says(packs):
    weight = matrix(96, 10)
    panels = packs.pack_weight(weight)
    assert panels.shape == (3, 5, 32, 2)
    for p, k, c, h in ((0, 0, 0, 0), (1, 4, 31, 1), (2, 3, 7, 0)):
        assert panels[p, k, c, h] == weight[32 * p + c, 2 * k + h]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 45),
    width=st.integers(1, 5),
    depth=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0),
)
def test_equals_the_reference(packs, reference, rows, width, depth, biased, seed):
    x, panels = (
        matrix(rows, 2 * depth, seed=seed % 1000),
        packs.pack_weight(matrix(32 * width, 2 * depth, seed=seed % 999)),
    )
    bias = matrix(32 * width) if biased else None
    found, expected = packs.linear(x, panels, bias), reference.linear(x, panels, bias)
    assert found.shape == (rows, 32 * width) and found.dtype == torch.bfloat16
    # bf16 rounds to 2^-9; sums that cancel keep the absolute error of their terms
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-5 * depth)


def test_a_row_does_not_depend_on_the_rows_beside_it(packs):
    panels, x = packs.pack_weight(matrix(576, 1536)), matrix(61, 1536, seed=1)
    whole = packs.linear(x, panels)
    for begin, end in ((0, 1), (3, 5), (7, 14), (0, 15), (11, 45), (60, 61)):
        assert torch.equal(packs.linear(x[begin:end].contiguous(), panels), whole[begin:end])


def test_the_number_of_threads_changes_nothing(packs):
    panels, x = packs.pack_weight(matrix(32 * 7, 64)), matrix(9, 64, seed=1)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(packs.linear(x, panels))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nan_and_infinity_stay_in_their_row(packs):
    panels, x = packs.pack_weight(matrix(64, 8)), matrix(3, 8)
    x[1, 5] = float("nan")
    out = packs.linear(x, panels)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_matrices_it_does_not_suit_are_left_to_torch(ops):
    assert ops.pack_weight(torch.zeros(32, 4)) is None
    assert ops.pack_weight(torch.zeros(33, 4, dtype=torch.bfloat16)) is None
    assert ops.pack_weight(torch.zeros(32, 5, dtype=torch.bfloat16)) is None


def test_bad_arguments_are_refused(ops):
    panels, x = torch.zeros(2, 3, 32, 2, dtype=torch.bfloat16), torch.zeros(1, 6, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="width 4"):
        ops.linear(x[:, :4].contiguous(), panels)
    with pytest.raises(ValueError, match="what `pack_weight` returned"):
        ops.linear(x, panels[0])
    with pytest.raises(TypeError, match="panels"):
        ops.linear(x, panels.float())
    with pytest.raises(ValueError, match="bias"):
        ops.linear(x, panels, torch.zeros(63, dtype=torch.bfloat16))
