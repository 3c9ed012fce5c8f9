"""Products with a packed matrix: torch's numbers, and rows that do not know each other, in every element type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


class Packs:
    """The C++ backend with weights of one kind: those that bfloat16 holds exactly, or not."""

    def __init__(self, cpp, dtype: torch.dtype, exact: bool) -> None:
        self.cpp, self.dtype, self.exact = cpp, dtype, exact
        self.linear = cpp.linear

    def rows(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def weight(self, *shape: int, seed: int = 0) -> torch.Tensor:
        weight = self.rows(*shape, seed=seed)
        return weight.bfloat16().to(self.dtype) if self.exact else weight

    def packed(self, *shape: int, seed: int = 0) -> torch.Tensor:
        panels = self.cpp.pack_weight(self.weight(*shape, seed=seed))
        if panels is None:
            pytest.skip("this processor has AMX: oneDNN's products of bf16 are used")
        return panels


@pytest.fixture(
    scope="module",
    params=[(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)],
    ids=["bf16", "float32-pairs", "float32"],
)
def packs(cpp, request):
    return Packs(cpp, *request.param)


@pytest.fixture(scope="module")
def narrow(cpp):
    """The C++ backend, on processors that multiply bytes."""
    if cpp.pack_int8(torch.zeros(32, 16, dtype=torch.bfloat16)) is None:
        pytest.skip("this processor has no AVX512-VNNI: weights keep the model's dtype")
    return cpp


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_panels_hold_what_the_layout_says(packs):
    weight, panels = packs.weight(96, 10), packs.packed(96, 10)
    unit = 2 if packs.exact else 1
    assert panels.shape == (3, 10 // unit, 32, unit)
    assert panels.dtype == (torch.bfloat16 if packs.exact else torch.float32)
    for p, column, k in ((0, 0, 0), (1, 31, 9), (2, 7, 4)):
        assert panels[p, k // unit, column, k % unit] == weight[32 * p + column, k]


@settings(max_examples=60)
@given(
    rows=st.integers(0, 45),
    width=st.integers(1, 5),
    depth=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(packs, reference, rows, width, depth, biased, seed):
    x, panels = packs.rows(rows, 2 * depth, seed=seed), packs.packed(32 * width, 2 * depth, seed=seed + 1)
    bias = packs.rows(32 * width) if biased else None
    found, expected = packs.linear(x, panels, bias), reference.linear(x, panels, bias)
    assert found.shape == (rows, 32 * width) and found.dtype == packs.dtype
    # bf16 rounds to 2^-9; sums that cancel keep the absolute error of their terms
    rtol, atol = (2**-7, 2e-5) if packs.dtype is torch.bfloat16 else (1e-5, 1e-6)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol * depth)


def test_a_row_does_not_depend_on_the_rows_beside_it(packs):
    panels, x = packs.packed(576, 1536), packs.rows(61, 1536, seed=1)
    whole = packs.linear(x, panels)
    for begin, end in ((0, 1), (3, 5), (7, 14), (0, 15), (11, 45), (60, 61)):
        assert torch.equal(packs.linear(x[begin:end].contiguous(), panels), whole[begin:end])


def test_the_number_of_threads_changes_nothing(packs):
    panels, x = packs.packed(32 * 7, 64), packs.rows(9, 64, seed=1)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(packs.linear(x, panels))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nan_and_infinity_stay_in_their_row(packs):
    panels, x = packs.packed(64, 8), packs.rows(3, 8)
    x[1, 5] = float("nan")
    out = packs.linear(x, panels)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_float32_weights_that_bf16_holds_give_the_same_bits_in_half_the_memory(cpp):
    weight, x = matrix(64, 96).float(), torch.randn(5, 96)
    pairs, singles = cpp.pack_weight(weight), weight.view(2, 32, 96).transpose(1, 2).unsqueeze(3).contiguous()
    assert pairs.nbytes * 2 == singles.nbytes
    assert torch.equal(cpp.linear(x, pairs), cpp.linear(x, singles))


def test_matrices_it_does_not_suit_are_left_to_torch(ops):
    assert ops.pack_weight(torch.zeros(33, 4)) is None
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
    with pytest.raises(ValueError, match="what `pack_weight` returned"):
        ops.linear(x.float(), panels.float())
    with pytest.raises(ValueError, match="bias"):
        ops.linear(x, panels, torch.zeros(63, dtype=torch.bfloat16))


def unpacked(panels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[N, K] float32: the weights that eight bits stand for."""
    codes = panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).float() - 128
    return codes * scales[:, None]


def test_eight_bits_hold_the_weights_to_half_a_step(narrow):
    weight = matrix(96, 48)
    weight[5] = 0
    panels, scales = narrow.pack_int8(weight)
    assert panels.shape == (3, 12, 32, 4) and panels.dtype == torch.uint8
    error = (unpacked(panels, scales) - weight.float()).abs()
    assert (error <= 0.501 * scales[:, None]).all()
    assert torch.equal(scales, weight.float().abs().amax(1) / 127)


@settings(max_examples=60)
@given(rows=st.integers(0, 45), width=st.integers(1, 5), depth=st.integers(1, 12), seed=st.integers(0, 999))
def test_products_in_eight_bits_are_the_references_bit_for_bit(narrow, reference, rows, width, depth, seed):
    x, packed = matrix(rows, 16 * depth, seed=seed), narrow.pack_int8(matrix(32 * width, 16 * depth, seed=seed + 1))
    if rows:
        x[seed % rows] *= seed % 3  # also a row of zeros
    found = narrow.linear_int8(x, *packed)
    assert found.shape == (rows, 32 * width) and found.dtype == torch.bfloat16
    assert torch.equal(found, reference.linear_int8(x, *packed))


def test_products_in_eight_bits_are_near_the_true_ones(narrow):
    weight, x = matrix(256, 1536), matrix(20, 1536, seed=1)
    exact = x.double() @ weight.double().T
    error = narrow.linear_int8(x, *narrow.pack_int8(weight)).double() - exact
    assert error.std() < 0.02 * exact.std()


def test_in_eight_bits_nan_and_infinity_stay_in_their_row(narrow, reference):
    packed, x = narrow.pack_int8(matrix(64, 32)), matrix(4, 32)
    x[1, 5], x[2, 7] = float("nan"), float("-inf")
    for backend in (narrow, reference):
        out = backend.linear_int8(x, *packed)
        assert out[[1, 2]].isnan().all() and out[[0, 3]].isfinite().all()


def test_matrices_that_eight_bits_do_not_suit_are_left_alone(ops):
    assert ops.pack_int8(torch.zeros(32, 16)) is None
    assert ops.pack_int8(torch.zeros(33, 16, dtype=torch.bfloat16)) is None
    assert ops.pack_int8(torch.zeros(32, 8, dtype=torch.bfloat16)) is None


def test_bad_arguments_of_eight_bits_are_refused(ops):
    panels, scales = torch.zeros(2, 4, 32, 4, dtype=torch.uint8), torch.ones(64)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="width 8"):
        ops.linear_int8(x[:, :8].contiguous(), panels, scales)
    with pytest.raises(ValueError, match="what `pack_int8` returned"):
        ops.linear_int8(x, panels[0], scales)
    with pytest.raises(TypeError, match="panels"):
        ops.linear_int8(x, panels.float(), scales)
    with pytest.raises(ValueError, match="scales"):
        ops.linear_int8(x, panels, scales[:5])
