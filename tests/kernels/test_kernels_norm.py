"""RMS norm, its fused residual form and the gated SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels import Ops

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
ROWS = st.integers(0, 70)
WIDTHS = st.sampled_from([1, 3, 16, 64, 100, 576, 1536])


def noise(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to a flip of the last bit at each of the two roundings, and equal almost everywhere."""
    assert actual.dtype is expected.dtype
    half = actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2**-6 if half else 1e-5, atol=1e-6)
    if half and actual.numel():
        assert (actual != expected).float().mean() < 0.02 + 1 / actual.numel()


def test_rms_norm_matches_torch(ops: Ops) -> None:
    x, w = noise(9, 576, dtype=torch.float32), noise(576, dtype=torch.float32, seed=1)
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-5), F.rms_norm(x, (576,), w, 1e-5), rtol=1e-5, atol=1e-6)


def test_rms_norm_rounds_before_the_weight(ops: Ops) -> None:
    """Llama's order: float32 norm -> bfloat16 -> times the weight."""
    x, w = noise(50, 576, dtype=torch.bfloat16), noise(576, dtype=torch.bfloat16, seed=1)
    normed = F.rms_norm(x.float(), (576,), eps=1e-5).bfloat16()
    close(ops.rms_norm(x, w, 1e-5), normed * w)


def test_add_rms_norm_updates_the_residual_in_place(ops: Ops, dtype: torch.dtype) -> None:
    x, residual = noise(5, 96, dtype=dtype), noise(5, 96, dtype=dtype, seed=1)
    w, before, expected = noise(96, dtype=dtype, seed=2), x.clone(), residual + x
    normed, new = ops.add_rms_norm(x, residual, w, 1e-6)
    assert new.data_ptr() == residual.data_ptr()
    assert torch.equal(residual, expected) and torch.equal(x, before)
    assert torch.equal(normed, ops.rms_norm(expected, w, 1e-6))


def test_norm_propagates_nan_and_handles_zero(ops: Ops, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 32, dtype=dtype)
    x[1, 3] = float("nan")
    out = ops.rms_norm(x, torch.ones(32, dtype=dtype), 1e-6)
    assert torch.equal(out[0], torch.zeros(32, dtype=dtype)) and out[1].isnan().all()


def test_silu_mul_matches_torch(ops: Ops, dtype: torch.dtype) -> None:
    x = noise(7, 200, dtype=dtype)
    close(ops.silu_mul(x), F.silu(x[:, :100]) * x[:, 100:])


def test_silu_mul_extremes(ops: Ops, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, float("nan"), float("inf")]], dtype=dtype)
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))[0]
    assert out[:3].abs().max() < 1e-30
    assert out[3] == gate[0, 3] and out[4] == gate[0, 4] and out[5].isnan() and out[6].isinf()


@given(ROWS, WIDTHS, DTYPES)
@settings(max_examples=40)
def test_cpp_matches_reference(cpp: Ops, reference: Ops, n: int, width: int, dtype: torch.dtype) -> None:
    x, residual = noise(n, width, dtype=dtype, seed=n), noise(n, width, dtype=dtype, seed=n + 1)
    w, gates = noise(width, dtype=dtype, seed=2), noise(n, 2 * width, dtype=dtype, seed=3)
    close(cpp.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5))
    close(cpp.silu_mul(gates), reference.silu_mul(gates))
    normed, new = cpp.add_rms_norm(x, residual.clone(), w, 1e-5)
    expected, new_expected = reference.add_rms_norm(x, residual.clone(), w, 1e-5)
    close(normed, expected)
    assert torch.equal(new, new_expected)
