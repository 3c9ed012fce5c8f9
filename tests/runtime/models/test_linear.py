"""The packed product is the plain one, to the rounding of a sum in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echo_rl.runtime.models.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_product(dtype: torch.dtype, rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(rows, 64, dtype=dtype)
    bias = torch.randn(96, dtype=dtype) if biased else None
    linear = Linear(weight, bias)
    assert linear.in_features == 64
    found, expected = linear(x), F.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (rows, 96)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def bits(linear: Linear) -> int:
    """The bits that one element of the laid-out weight takes."""
    return 8 * linear._operands[0].element_size()


def test_eight_bits_are_near_the_plain_product_and_only_where_they_may_be() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    linear, bias = Linear(weight, int8=True), torch.randn(96).bfloat16()
    torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=0.05, atol=0.4)
    assert bits(linear) in (8, 16)
    assert bits(Linear(weight)) == bits(Linear(weight, bias, int8=True)) == 16
    assert bits(Linear(torch.randn(96, 64), int8=True)) == 32


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_rows_that_do_not_fit_are_refused(dtype: torch.dtype, int8: bool) -> None:
    """Whatever the layout: a product that trusted them would read memory that isn't theirs."""
    linear = Linear(torch.randn(96, 64, dtype=dtype), int8=int8)
    other = torch.float16
    for x in (torch.randn(5, 63, dtype=dtype), torch.randn(5, 64, dtype=other), torch.randn(64, 5, dtype=dtype).T):
        with pytest.raises(ValueError, match="contiguous rows of 64"):
            linear(x)
    assert linear(torch.randn(5, 64, dtype=dtype)).shape == (5, 96)
