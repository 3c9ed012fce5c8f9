"""Computes Gumbel noise keyed by (seed, position, token): the reference's bits, where they are used.

`row_key` and `noise` are device functions for other kernels too, so that a kernel which samples needs
no [R, vocab] noise in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_kernels.triton.aot_spec import KernelSpec

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
STEP = tl.constexpr(2.0**-32)
BLOCK = 1024


def gumbel(seeds: Tensor, positions: Tensor, vocab: int, device: torch.device) -> Tensor:
    out = torch.empty(seeds.shape[0], vocab, dtype=torch.float32, device=device)
    if out.numel():
        grid = (seeds.shape[0], triton.cdiv(vocab, BLOCK))
        _gumbel[grid](seeds.to(device), positions.to(device), out, vocab, BLOCK=BLOCK)
    return out


@triton.jit
def _gumbel(seeds: tl.tensor, positions: tl.tensor, out: tl.tensor, vocab: tl.int32, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = row_key(tl.load(seeds + row), tl.load(positions + row))
    tl.store(out + row * vocab + tokens, noise(key, tokens), mask=tokens < vocab)


@triton.jit
def row_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """uint64 keys of int64 seeds and positions of one shape."""
    mixed = _mix(seed.to(tl.uint64, bitcast=True))
    return _mix(mixed + position.to(tl.uint64, bitcast=True) * GOLDEN)


@triton.jit
def noise(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """float32 noise of int32 token ids under `row_key`s; the two broadcast."""
    x = uniform(key, token)
    return -tl.log(-_log1m(x))


@triton.jit
def uniform(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """float32 in (0, 1): bit for bit `echo_kernels.reference.gumbel_uniform`."""
    count = (token.to(tl.int64) + 1).to(tl.uint64, bitcast=True)
    bits = (_mix(key + count * GOLDEN) >> 32).to(tl.uint32)  # the top 32 of 64 bits
    return tl.minimum((bits.to(tl.float32) + 0.5) * STEP, BELOW_ONE)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """The splitmix64 finaliser."""
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _log1m(x: tl.tensor) -> tl.tensor:
    """log(1 - x) for x in (0, 1) to a few units in the last place.

    u = 1 - x is rounded; log(u) * x / (1 - u) takes that rounding back (Kahan), as 1 - u is exact.
    """
    u = 1.0 - x
    return tl.where(u == 1.0, -x, tl.log(u) * (x / (1.0 - u)))


AOT = (
    KernelSpec(
        "gumbel",
        _gumbel,
        {"seeds": "*i64", "positions": "*i64", "out": "*fp32", "vocab": "i32"},
        {"BLOCK": BLOCK},
        aligned=frozenset({"seeds", "positions", "out", "vocab"}),
    ),
)
