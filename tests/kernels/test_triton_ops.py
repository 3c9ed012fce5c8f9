"""The Triton kernels other than attention against the reference, by hypothesis over ragged shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from echo_kernels import Ops
from echo_kernels.reference import gumbel_uniform
from tests.kernels import test_kernels_rope as ropes
from tests.kernels.test_kernels_norm import noise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ULP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A flip of the last bit; in float32 a few of them."""
DTYPES = st.sampled_from(list(ULP))
WIDTHS = st.sampled_from([1, 3, 16, 100, 576, 1536])


def close(actual: Tensor, expected: Tensor, flips: int = 1) -> None:
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    tolerance = ULP[actual.dtype] * flips
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=1e-6)


@given(st.integers(0, 12), WIDTHS, DTYPES)
@settings(max_examples=30)
def test_norms(triton_ops: Ops, reference: Ops, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (noise(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width)] * 2 + [(width,)]))
    close(triton_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), flips=2)
    mine, theirs = residual.clone(), residual.clone()
    normed, new = triton_ops.add_rms_norm(x, mine, weight, 1e-5)
    expected, _ = reference.add_rms_norm(x, theirs, weight, 1e-5)
    assert new is mine and torch.equal(mine, theirs)
    close(normed, expected, flips=2)


@given(st.integers(0, 12), st.sampled_from([1, 3, 100, 1023, 1024, 1025, 2500]), DTYPES)
@settings(max_examples=30)
def test_silu_mul(triton_ops: Ops, reference: Ops, rows: int, width: int, dtype: torch.dtype) -> None:
    x = noise(rows, 2 * width, dtype=dtype, seed=width)
    close(triton_ops.silu_mul(x), reference.silu_mul(x), flips=2)


@given(
    st.integers(0, 20), st.integers(0, 3), st.integers(1, 5), st.sampled_from([2, 20, 64, 128]), DTYPES, st.booleans()
)
@settings(max_examples=40)
def test_rope_store(
    triton_ops: Ops, reference: Ops, rows: int, group: int, kv_heads: int, dim: int, dtype: torch.dtype, norm: bool
) -> None:
    """A group of 0 heads stores keys and values alone, as the drafter does when it absorbs pairs."""
    case = ropes.build(rows, group * kv_heads, kv_heads, dim, dtype, norm)
    for actual, expected in zip(case.run(triton_ops), case.run(reference), strict=True):
        close_to = ULP[dtype]
        torch.testing.assert_close(actual.float(), expected.float(), rtol=close_to, atol=1e-5)


@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=40, unique_by=lambda pair: pair[1]),
    st.sampled_from([(3,), (2, 8), (1100,), (0,)]),
    st.integers(1, 3),
)
@settings(max_examples=30)
def test_compact_kv(
    triton_ops: Ops, reference: Ops, moves: list[tuple[int, int]], row: tuple[int, ...], layers: int
) -> None:
    src, dst = torch.tensor(moves, dtype=torch.int64).view(-1, 2).T.contiguous()
    pools = [torch.randn(layers, 40, *row).to(d) for d in (*ULP, torch.int64)]
    mine, theirs = ([p.clone() for p in pools] for _ in range(2))
    triton_ops.compact_kv(mine, src, dst)
    reference.compact_kv(theirs, src, dst)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@given(st.integers(0, 5), st.integers(1, 9000), st.integers(1, 50), DTYPES, st.integers(0, 2**31))
@settings(max_examples=40)
def test_best_token(
    triton_ops: Ops, reference: Ops, rows: int, vocab: int, values: int, dtype: torch.dtype, seed: int
) -> None:
    """Logits of few distinct values: ties everywhere, and now and then a NaN or an infinity."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, values, (7, vocab), generator=g).to(dtype)
    logits[0, seed % vocab], logits[1], logits[2, seed % vocab] = float("nan"), float("-inf"), float("inf")
    picked = torch.randint(0, 7, (rows,), generator=g)
    for actual, expected in zip(
        triton_ops.best_token(logits, picked), reference.best_token(logits, picked), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


KEYS = st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40)), max_size=4)


@given(KEYS, st.integers(1, 3000))
@settings(max_examples=30)
def test_gumbel(triton_ops: Ops, reference: Ops, keys: list[tuple[int, int]], vocab: int) -> None:
    seeds, positions = torch.tensor(keys, dtype=torch.int64).view(-1, 2).T.contiguous()
    actual, expected = (o.gumbel(seeds, positions, vocab, "cpu") for o in (triton_ops, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=5e-7)
    assert torch.equal(actual.argmax(1), expected.argmax(1))


@pytest.mark.usefixtures("triton_ops")
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 200_000))
@settings(max_examples=30)
def test_uniform_has_the_bits_of_the_reference(seed: int, position: int, first: int) -> None:
    from echo_kernels.triton.gumbel import row_key, uniform

    @triton.jit
    def draw(seeds, positions, out, first, KEY: tl.constexpr, UNIFORM: tl.constexpr):
        lane = tl.arange(0, 64)
        tl.store(out + lane, UNIFORM(KEY(tl.load(seeds), tl.load(positions)), first + lane))

    key = [torch.tensor([x], device=DEVICE) for x in (seed, position)]
    out = torch.empty(64, device=DEVICE)
    draw[(1,)](*key, out, first, row_key, uniform)
    assert torch.equal(out.cpu(), gumbel_uniform(key[0].cpu(), key[1].cpu(), first + 64)[0, first:])
