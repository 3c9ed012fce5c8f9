"""Tree attention: the reference against torch's own attention, the C++ backend against the reference.

A case is built from logical keys and values, request by request, and only then scattered into pages,
so the expectation never reads a block table.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels import Ops

TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (2**-7, 2e-3)}  # relative, absolute


@dataclass
class Case:
    q: Tensor  # [N, H, D]
    keys: list[Tensor]  # per request [kv, KV, D]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    block_size: int
    q_start: Tensor
    ctx: Tensor
    kv: Tensor
    mask: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def run(self, ops: Ops) -> Tensor:
        return ops.tree_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.tables,
            self.block_size,
            self.q_start,
            self.ctx,
            self.kv,
            self.mask,
            self.scale,
        )

    def torch_attention(self) -> Tensor:
        """scaled_dot_product_attention, one request at a time, in float32."""
        out = torch.zeros_like(self.q, dtype=torch.float32)
        for r, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            first, last = self.q_start[r : r + 2].tolist()
            if first == last:
                continue
            ctx, kv = int(self.ctx[r]), int(self.kv[r])
            seen = torch.cat([torch.ones(last - first, ctx, dtype=torch.bool), self.mask[first:last, : kv - ctx]], 1)
            q, k, v = (t.float().transpose(0, 1) for t in (self.q[first:last], keys, values))
            out[first:last] = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=self.scale, enable_gqa=True
            )[0].transpose(0, 1)
        return out


def build(
    shape: list[tuple[int, int, int]],  # per request: query rows, context, keys after the context
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 64,
    block_size: int = 16,
    seed: int = 0,
    causal: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(dtype)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    kv = [c + e for _, c, e in shape]
    n, width = sum(rows for rows, _, _ in shape), max(e for _, _, e in shape) + 2
    pages = [-(-length // block_size) for length in kv]
    order = torch.randperm(sum(pages) + 1, generator=g).tolist()  # one page belongs to nobody
    tables = torch.full((len(shape), max(pages) + 1), 2**30, dtype=torch.int32)  # unused entries point nowhere
    k_cache, v_cache = (torch.full((len(order) * block_size, kv_heads, dim), 1e30, dtype=dtype) for _ in range(2))
    keys, values = [], []
    for r, length in enumerate(kv):
        keys.append(noise(length, kv_heads, dim))
        values.append(noise(length, kv_heads, dim))
        for p in range(length):
            page = p // block_size
            if p % block_size == 0:
                tables[r, page] = order.pop()
            slot = int(tables[r, page]) * block_size + p % block_size
            k_cache[slot], v_cache[slot] = keys[r][p], values[r][p]
    mask = torch.rand(n, width, generator=g) < 0.4
    if causal:
        mask = torch.cat([torch.ones(rows, width, dtype=torch.bool).tril() for rows, _, _ in shape])
    for r, (rows, ctx, extra) in enumerate(shape):
        if ctx == 0 and extra:  # so that every row sees a key
            start = sum(s[0] for s in shape[:r])
            mask[start : start + rows, 0] = True
    starts = [sum(s[0] for s in shape[:r]) for r in range(len(shape) + 1)]
    q = noise(n, kv_heads * group, dim)
    ctx_lens = ints([c for _, c, _ in shape])
    return Case(q, keys, values, k_cache, v_cache, tables, block_size, ints(starts), ctx_lens, ints(kv), mask)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype is dtype
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


SHAPES = {
    "decode": [(1, 299, 1), (1, 15, 1), (1, 16, 1), (1, 0, 1)],
    "ragged verify": [(7, 33, 7), (0, 40, 3), (1, 64, 1), (30, 5, 30)],
    "empty last request": [(3, 8, 3), (0, 0, 0)],
    "more than one tile": [(70, 130, 70), (17, 64, 17), (16, 0, 16)],
    "single node": [(1, 63, 1)],
    "context alone": [(2, 44, 0), (1, 64, 0), (3, 129, 0)],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_matches_torch_attention(ops: Ops, dtype: torch.dtype, shape: list, group: int, dim: int) -> None:
    case = build(shape, dtype, group=group, dim=dim)
    close(case.run(ops), case.torch_attention(), dtype)


def test_chunked_prefill_is_causal(ops: Ops, dtype: torch.dtype) -> None:
    case = build([(150, 0, 150), (60, 90, 60)], dtype, kv_heads=3, causal=True)
    close(case.run(ops), case.torch_attention(), dtype)


requests = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 140), st.integers(0, 40)), min_size=1, max_size=4)


@given(
    requests,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 7]),
    st.sampled_from([8, 20, 64, 96, 128]),
    st.sampled_from([1, 7, 16, 64]),
    st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_cpp_matches_reference(
    cpp: Ops,
    reference: Ops,
    shape: list[tuple[int, int, int]],
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    seed: int,
) -> None:
    case = build(shape, dtype, kv_heads, group, dim, block_size, seed)
    close(case.run(cpp), case.run(reference), dtype)


def test_a_request_does_not_see_the_batch(ops: Ops, dtype: torch.dtype) -> None:
    """The same rows, alone and among others: the very same bits."""
    case = build([(5, 70, 5), (1, 300, 1), (20, 20, 20)], dtype)
    alone = Case(
        case.q[:5],
        case.keys[:1],
        case.values[:1],
        case.k_cache,
        case.v_cache,
        case.tables[:1],
        case.block_size,
        case.q_start[:2],
        case.ctx[:1],
        case.kv[:1],
        case.mask[:5],
    )
    assert torch.equal(alone.run(ops), case.run(ops)[:5])


def test_buffers_may_be_wider_than_the_batch_needs(ops: Ops) -> None:
    case = build([(5, 70, 5), (1, 30, 1)])
    expected = case.run(ops)
    case.tables = torch.cat([case.tables, torch.full((2, 9), -1, dtype=torch.int32)], 1)[:, : case.tables.shape[1]]
    case.mask = torch.cat([case.mask, torch.ones(6, 9, dtype=torch.bool)], 1)[:, : case.mask.shape[1]]
    assert not case.tables.is_contiguous() and torch.equal(case.run(ops), expected)


def test_a_row_that_sees_nothing_is_zero(ops: Ops, dtype: torch.dtype) -> None:
    case = build([(3, 0, 70)], dtype)
    case.mask[1] = False
    out = case.run(ops)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[[0, 2]].abs().sum() > 0 and not out.isnan().any()


def test_no_query_rows_at_all(ops: Ops) -> None:
    assert build([(0, 8, 1)]).run(ops).shape == (0, 6, 64)


def test_nan_in_a_query_reaches_its_row_only(ops: Ops, dtype: torch.dtype) -> None:
    case = build([(4, 90, 4)], dtype)
    case.q[2, 1, 5] = float("nan")
    out = case.run(ops)
    assert out[2, 1].isnan().all()
    out[2, 1] = 0
    assert not out.isnan().any()


def test_nan_in_a_key_reaches_the_rows_that_see_it(ops: Ops, dtype: torch.dtype) -> None:
    case = build([(2, 20, 2)], dtype)
    case.mask[:, 1] = torch.tensor([False, True])
    slot = int(case.tables[0, 21 // 16]) * 16 + 21 % 16
    case.k_cache[slot] = float("nan")
    out = case.run(ops)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_visible_logits_of_minus_infinity_are_not_hidden(ops: Ops) -> None:
    case = build([(1, 0, 1)])
    case.q.fill_(1.0)
    case.k_cache.fill_(float("-inf"))
    assert case.run(ops).isnan().all()


def test_large_logits_do_not_overflow(ops: Ops, dtype: torch.dtype) -> None:
    case = build([(6, 200, 6)], dtype)
    case.q.mul_(100)
    close(case.run(ops), case.torch_attention(), dtype)


@pytest.mark.parametrize("entry", [-1, 1000])
def test_cpp_rejects_a_page_outside_the_cache(cpp: Ops, entry: int) -> None:
    case = build([(2, 20, 2)])
    case.tables[0, 1] = entry
    with pytest.raises(IndexError, match="block_tables"):
        case.run(cpp)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("q_start", [0, 1], "from 0 to N"),
        ("kv", [10], "ctx_lens <= kv_lens"),
        ("kv", [30], "mask is narrower"),
        ("ctx", [-1], "ctx_lens"),
    ],
)
def test_cpp_rejects_lengths_that_disagree(cpp: Ops, field: str, values: list[int], message: str) -> None:
    case = build([(2, 20, 2)])
    setattr(case, field, torch.tensor(values, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        case.run(cpp)


@pytest.mark.parametrize("ctx", [0, 3, 60, 70, 250])
def test_cpp_gives_a_path_in_a_tree_the_bits_of_the_path_alone(cpp: Ops, dtype: torch.dtype, ctx: int) -> None:
    """Speculation must not show in the numbers: a node's row equals the row of plain decoding."""
    g, nodes, group, kv_heads, dim = torch.Generator().manual_seed(ctx), 90, 3, 2, 64
    parents = [-1] + [int(torch.randint(0, n, (), generator=g)) for n in range(1, nodes)]
    mask = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node, parent in enumerate(parents):
        mask[node] = mask[parent] if parent >= 0 else False
        mask[node, node] = True
    rows = torch.randn(2, ctx + nodes, kv_heads, dim, generator=g).to(dtype) * 2
    q = torch.randn(nodes, group * kv_heads, dim, generator=g).to(dtype) * 2

    def attend(queries: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
        k, v = rows[:, kept].contiguous()
        pages = torch.arange(len(kept), dtype=torch.int32)[None]
        lengths = (torch.tensor([n], dtype=torch.int32) for n in (len(kept) - seen.shape[1], len(kept)))
        start = torch.tensor([0, len(queries)], dtype=torch.int32)
        return cpp.tree_attention(queries, k, v, pages, 1, start, *lengths, seen, dim**-0.5)

    tree = attend(q, torch.arange(ctx + nodes), mask)
    for node in range(0, nodes, 7):
        path = ctx + mask[node].nonzero()[:, 0]
        alone = attend(q[node : node + 1], torch.cat([torch.arange(ctx), path]), torch.ones(1, len(path)) > 0)
        assert torch.equal(alone[0], tree[node])
