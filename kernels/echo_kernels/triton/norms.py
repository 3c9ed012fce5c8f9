"""Computes RMS norm, its fused residual form and the gated SiLU: one program a row (the SiLU: a piece of a row)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.triton.aot_spec import KernelSpec

SILU_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _norm_rows(x, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    _norm_rows(x, residual, weight, out, eps)
    return out, residual


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        _silu_mul[(rows, triton.cdiv(width, SILU_BLOCK))](gate_up, out, width, BLOCK=SILU_BLOCK)
    return out


def _norm_rows(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    rows, width = x.shape
    if x.numel():
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](x, residual, weight, out, width, eps, BLOCK=block, num_warps=_warps(block))


def _warps(block: int) -> int:
    """About eight elements a thread, four warps to sixteen."""
    return min(max(block // 256, 4), 16)


@triton.jit
def _rms_norm(
    x: tl.tensor,  # [N, width]
    residual: tl.tensor,  # [N, width], updated; or None
    weight: tl.tensor,  # [width]
    out: tl.tensor,  # [N, width]
    width: tl.int32,
    eps: tl.float32,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if residual is not None:
        before = tl.load(residual + row + column, mask=inside, other=0.0)
        value = (before.to(tl.float32) + value.to(tl.float32)).to(value.dtype)
        tl.store(residual + row + column, value, mask=inside)
    h = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / width + eps)
    normed = (h * scale).to(value.dtype).to(tl.float32)  # rounded before the weight, as Hugging Face does
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (normed * w).to(value.dtype), mask=inside)


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, width: tl.int32, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype).to(tl.float32)  # rounded before the product
    tl.store(out + row * width + column, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


def _aot() -> Iterator[KernelSpec]:
    for dtype in ("bf16", "fp16", "fp32"):
        yield KernelSpec(
            f"silu_mul_{dtype}",
            _silu_mul,
            {"gate_up": f"*{dtype}", "out": f"*{dtype}", "width": "i32"},
            {"BLOCK": SILU_BLOCK},
            aligned=frozenset({"gate_up", "out", "width"}),
        )
        for block in (1024, 4096, 8192):
            for fused in (False, True):
                pointers = ("x", "residual", "weight", "out") if fused else ("x", "weight", "out")
                yield KernelSpec(
                    f"{'add_' if fused else ''}rms_norm_{dtype}_{block}",
                    _rms_norm,
                    dict.fromkeys(pointers, f"*{dtype}") | {"width": "i32", "eps": "fp32"},
                    {"BLOCK": block} | ({} if fused else {"residual": None}),
                    num_warps=_warps(block),
                    aligned=frozenset({*pointers, "width"}),
                )


AOT = tuple(_aot())
