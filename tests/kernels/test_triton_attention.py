"""The Triton attention against the reference, under its own plan and under plans forced on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from echo_kernels import Ops
from echo_kernels.triton.attention_plan import MAX_SPLITS, Plan, plan_attention
from tests.kernels.test_kernels_attention import Case, build

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (2**-7, 4e-3), torch.float16: (2**-9, 1e-3)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from(list(TOLERANCE))
REQUESTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 90), st.integers(0, 20)), min_size=1, max_size=3)
PLANS = st.builds(
    lambda group, block_m, block_n, block_t, splits: Plan(
        block_m // group, block_m, block_n, min(block_t, block_n), splits, warps=4, stages=2
    ),
    st.just(3),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([16, 32]),
    st.sampled_from([1, 2, 4, MAX_SPLITS]),
)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype is dtype
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol, equal_nan=True)


def make(shape: list[tuple[int, int, int]], dtype: torch.dtype, **sizes: int) -> Case:
    """`build`, in any dtype: what belongs to nobody in the caches overflows to infinity in float16."""
    case = build(shape, **sizes)
    for name in ("q", "k_cache", "v_cache"):
        setattr(case, name, getattr(case, name).to(dtype))
    return case


def run(case: Case, plan: Plan) -> Tensor:
    """The case under a plan, with an output that shows what was never written."""
    from echo_kernels.triton.attention import launch  # triton reads TRITON_INTERPRET here, after conftest

    out = torch.full_like(case.q, 77.0).to(DEVICE)
    tensors = (case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.ctx, case.kv, case.mask)
    q, keys, values, tables, *lengths, mask = (t.to(DEVICE) for t in tensors)
    launch(plan, out, q, keys, values, tables, case.block_size, *lengths, mask, case.scale)
    return out.cpu()


@given(
    REQUESTS, DTYPES, st.integers(1, 2), st.integers(1, 8), st.sampled_from([8, 20, 64, 128]),
    st.sampled_from([1, 7, 16, 64]), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40)
def test_matches_reference(
    triton_ops: Ops,
    reference: Ops,
    shape: list[tuple[int, int, int]],
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    seed: int,
) -> None:
    case = make(shape, dtype, kv_heads=kv_heads, group=group, dim=dim, block_size=block_size, seed=seed)
    close(case.run(triton_ops), case.run(reference), dtype)


@given(REQUESTS, DTYPES, PLANS, st.sampled_from([16, 64]), st.integers(0, 2**31))
@settings(max_examples=30)
@pytest.mark.usefixtures("triton_ops")
def test_every_plan_gives_the_reference(
    reference: Ops, shape: list[tuple[int, int, int]], dtype: torch.dtype, plan: Plan, block_size: int, seed: int
) -> None:
    case = make(shape, dtype, kv_heads=1, group=3, dim=16, block_size=block_size, seed=seed)
    close(run(case, plan), case.run(reference), dtype)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("block_size", [16, 64])
def test_page_and_tile_boundaries(triton_ops: Ops, reference: Ops, block_size: int, extra: int) -> None:
    shape = [(1, 64 + extra, 1), (2, 128 + extra, 2), (3, 16 + extra, 16 - extra), (1, 32 + extra, 0)]
    case = build(shape, dim=16, block_size=block_size)
    close(case.run(triton_ops), case.run(reference), torch.float32)


def plan(splits: int) -> Plan:
    return Plan(5, 16, 32, 16, splits, warps=4, stages=2)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_see_little(reference: Ops, triton_ops: Ops, splits: int) -> None:
    """A row that sees nothing, one that sees one key, one whose only visible part holds a logit of -inf."""
    case = build([(4, 0, 100), (1, 40, 1)], group=3, dim=16, causal=True)
    case.mask[:4] = False
    case.mask[1, 70] = case.mask[2, 5] = case.mask[2, 90] = case.mask[3, 5] = True
    case.q.fill_(1.0)
    case.k_cache[int(case.tables[0, 0]) * 16 + 5] = float("-inf")
    out = run(case, plan(splits))
    close(out, case.run(reference), torch.float32)
    assert (out[0] == 0).all() and out[3].isnan().all()
    assert torch.allclose(out[1], case.values[0][70].repeat_interleave(3, 0))
    assert torch.allclose(out[2], case.values[0][90].repeat_interleave(3, 0))


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("splits", [1, 4])
def test_large_logits_do_not_overflow(reference: Ops, splits: int) -> None:
    case = build([(6, 200, 6)], group=3, dim=16)
    case.q.mul_(200)
    close(run(case, plan(splits)), case.run(reference), torch.float32)


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("splits", [1, 4])
def test_nan_reaches_the_rows_that_see_it(splits: int) -> None:
    case = build([(3, 20, 30)], group=3, dim=16)
    case.mask[:, 25] = torch.tensor([True, False, False])
    case.k_cache[int(case.tables[0, 45 // 16]) * 16 + 45 % 16] = float("nan")
    out = run(case, plan(splits))
    assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("splits", [1, 2])
def test_a_request_does_not_see_the_batch_under_one_plan(splits: int) -> None:
    shape = [(5, 70, 5), (1, 100, 1), (20, 20, 20)]
    together = build(shape, torch.bfloat16, group=3, dim=16)
    alone = build(shape, torch.bfloat16, group=3, dim=16)
    alone.q, alone.mask, alone.q_start = alone.q[6:], alone.mask[6:], torch.tensor([0, 20], dtype=torch.int32)
    alone.tables, alone.ctx, alone.kv = alone.tables[2:], alone.ctx[2:], alone.kv[2:]
    assert torch.equal(run(alone, plan(splits)), run(together, plan(splits))[6:])


@pytest.mark.usefixtures("triton_ops")
def test_more_requests_than_are_searched_at_once(reference: Ops) -> None:
    case = build([(i % 2, 1, i % 2) for i in range(300)], kv_heads=1, group=3, dim=16, block_size=1)
    close(run(case, plan(1)), case.run(reference), torch.float32)


@given(
    st.integers(1, 5000), st.integers(1, 300), st.integers(1, 16), st.sampled_from([1, 2, 8]),
    st.sampled_from([16, 64, 128, 256]), st.integers(1, 100_000), st.sampled_from([2, 4]), st.sampled_from([1, 132]),
)  # fmt: skip
def test_plans_fit_the_device(
    rows: int, batch: int, group: int, kv_heads: int, width: int, max_keys: int, itemsize: int, processors: int
) -> None:
    chosen = plan_attention(rows, batch, group, kv_heads, width, max_keys, itemsize, processors)
    for size in (chosen.block_m, chosen.block_n, chosen.block_t, chosen.splits):
        assert size & (size - 1) == 0
    assert chosen.rows >= 1 and chosen.rows * group <= chosen.block_m and 16 <= chosen.block_m <= 64
    assert chosen.block_n % chosen.block_t == 0 and chosen.block_n * width * itemsize <= 16384
    busy = max(batch, -(-rows // chosen.rows)) * kv_heads
    assert chosen.splits == 1 or (chosen.splits * busy <= 2 * processors and max_keys >= 256 * chosen.splits)


def test_plans_split_long_requests_of_small_batches_alone() -> None:
    def splits(batch: int, keys: int) -> int:
        return plan_attention(batch, batch, 4, 8, 128, keys, 2, 132).splits

    assert (splits(1, 32_000), splits(1, 200), splits(8, 32_000), splits(64, 32_000)) == (MAX_SPLITS, 1, 4, 1)
