"""Splitting, per-head norm, rotary embedding and the cache write."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels import Ops

EPS = 1e-6


@dataclass
class Case:
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    heads: int
    kv_heads: int
    dim: int
    q_weight: Tensor | None
    k_weight: Tensor | None

    def run(self, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """q and the two caches, which hold 7 where nothing was stored."""
        k_cache, v_cache = (torch.full((128, self.kv_heads, self.dim), 7, dtype=self.qkv.dtype) for _ in range(2))
        tables = (self.cos, self.sin, self.positions, self.slots)
        q = ops.rope_store(self.qkv, *tables, k_cache, v_cache, self.heads, self.q_weight, self.k_weight, EPS)
        return q, k_cache, v_cache


def build(
    n: int, heads: int = 6, kv_heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.float32, norm: bool = False
) -> Case:
    g = torch.Generator().manual_seed(n + dim)
    angles = torch.arange(200)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], 1)
    slots = torch.randperm(128, generator=g)[:n]
    slots[::3] = -1
    weights = [(torch.rand(dim, generator=g) + 0.5).to(dtype) if norm else None for _ in range(2)]
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim, generator=g).to(dtype)
    positions = torch.randint(0, 200, (n,), generator=g)
    return Case(qkv, angles.cos(), angles.sin(), positions, slots, heads, kv_heads, dim, *weights)


def hugging_face(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, D]: Qwen3's head norm, then apply_rotary_pos_emb with rotate_half; float32."""
    x = x.float()
    if weight is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.float(), EPS)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def close(actual: Tensor, expected: Tensor) -> None:
    half = actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7 if half else 1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head norm"])
@pytest.mark.parametrize("dim", [64, 128])
def test_matches_hugging_face(ops: Ops, dtype: torch.dtype, dim: int, norm: bool) -> None:
    case = build(20, dim=dim, dtype=dtype, norm=norm)
    q, k_cache, v_cache = case.run(ops)
    parts = case.qkv.view(20, -1, dim).split([6, 2, 2], dim=1)
    cos, sin = case.cos[case.positions], case.sin[case.positions]
    close(q, hugging_face(parts[0], case.q_weight, cos, sin))
    keys = hugging_face(parts[1], case.k_weight, cos, sin)
    untouched = torch.ones(128, dtype=torch.bool)
    for row, slot in enumerate(case.slots.tolist()):
        if slot >= 0:
            close(k_cache[slot], keys[row])
            assert torch.equal(v_cache[slot], parts[2][row])
            untouched[slot] = False
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()


@given(
    st.integers(0, 90),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([2, 16, 20, 64, 128]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=40)
def test_cpp_matches_reference(
    cpp: Ops, reference: Ops, n: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, norm: bool
) -> None:
    case = build(n, kv_heads * group, kv_heads, dim, dtype, norm)
    for actual, expected in zip(case.run(cpp), case.run(reference), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(("field", "value"), [("positions", 200), ("positions", -1), ("slots", 128), ("slots", -2)])
def test_cpp_rejects_indices_out_of_range(cpp: Ops, field: str, value: int) -> None:
    case = build(4)
    getattr(case, field)[2] = value
    with pytest.raises(IndexError, match=rf"{field}\[2\] is {value}"):
        case.run(cpp)
