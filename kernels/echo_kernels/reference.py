"""Specifies the operations in plain torch, on any device and floating dtype.

Written to be read, not to be fast. Knows nothing of other backends; `echo_kernels.ops` checks the
arguments before they arrive here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
BELOW_ONE = 1.0 - 2.0**-24
"""The largest float32 below 1: keeps the uniform variate inside (0, 1)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * _normalise(x, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    kv_heads, dim = k_cache.shape[1:]
    heads = qkv.view(-1, num_heads + 2 * kv_heads, dim)  # [N, H + 2 KV, D]
    q, k, v = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [N, 1, D]
    q = _rotate(_head_norm(q, q_weight, eps), c, s).to(qkv.dtype)
    k = _rotate(_head_norm(k, k_weight, eps), c, s).to(qkv.dtype)
    kept = slots >= 0
    rows = slots[kept]
    k_cache[rows] = k[kept]
    v_cache[rows] = v[kept]
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    block_size: int,
    q_start: Tensor,
    ctx_lens: Tensor,
    kv_lens: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    out = torch.zeros_like(q)
    starts = q_start.tolist()
    for r, (ctx, kv) in enumerate(zip(ctx_lens.tolist(), kv_lens.tolist(), strict=True)):
        rows = slice(starts[r], starts[r + 1])
        if rows.start == rows.stop or kv == 0:
            continue
        logical = torch.arange(kv, device=q.device)
        slots = block_tables[r].long()[logical // block_size] * block_size + logical % block_size
        visible = torch.ones(rows.stop - rows.start, kv, dtype=torch.bool, device=q.device)
        visible[:, ctx:] = mask[rows, : kv - ctx]
        out[rows] = _attend(q[rows], k_cache[slots], v_cache[slots], visible, scale)
    return out


def compact_kv(pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    for pool in pools:
        pool[:, dst] = pool[:, src]  # the right side is gathered whole before anything is written


def gumbel(seeds: Tensor, positions: Tensor, vocab: int, device: torch.device) -> Tensor:
    x = gumbel_uniform(seeds.to(device), positions.to(device), vocab)
    return x.neg().log1p().neg().log().neg()


def gumbel_uniform(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """[R, vocab] float32 in (0, 1): the variate behind `gumbel`, for the tests of its bits."""
    keys = _mix(_mix(seeds) + positions * _signed(GOLDEN))  # [R]
    tokens = torch.arange(1, vocab + 1, device=seeds.device) * _signed(GOLDEN)
    bits = _shift(_mix(keys.unsqueeze(1) + tokens), 32)  # [R, vocab], the top 32 of 64 bits
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=BELOW_ONE)


def pack_weight(weight: Tensor) -> None:
    """Returns None: torch's own product is the better one here."""


def linear(x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    product = F.linear(x.float(), _unpacked(panels).float(), None if bias is None else bias.float())
    return product.to(x.dtype)


def pack_int8(weight: Tensor) -> None:
    """Returns None: there is no narrower product here."""


def linear_int8(x: Tensor, panels: Tensor, scales: Tensor) -> Tensor:
    weight = _unpacked(panels).double() - 128.0
    h = x.float()
    peak = h.abs().amax(1, keepdim=True)
    steps = torch.full_like(peak, 127.0).div(peak).where(peak > 0, 0.0)  # a true quotient: scalar / tensor is not
    codes = (h * steps).round().nan_to_num().double()
    unit = peak / 127.0 + (h - h).sum(1, keepdim=True)  # NaN where the row holds one, or an infinity
    return ((codes @ weight.T).float() * (scales * unit)).to(x.dtype)


def best_token(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    best, tokens = logits[rows].float().max(dim=1)  # max propagates NaN
    return tokens.masked_fill(best.isnan(), 0), best


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x = logits.float()
    values, tokens = (t[:, :k] for t in x.sort(dim=1, descending=True, stable=True))
    total = x.logsumexp(dim=1, keepdim=True)
    log_probs = (values - total).clamp(max=0.0).where(total.isfinite(), float("-inf"))
    return log_probs, tokens.where(log_probs > float("-inf"), 0)


def _unpacked(panels: Tensor) -> Tensor:
    """[N, K]: the elements of a packed matrix at their original places."""
    return panels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def _normalise(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, in float32 (HF Llama: cast to x.dtype *before* the weight)."""
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def _head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """float32 heads, normalised where the model has a weight [D] for it."""
    return x.float() if weight is None else _normalise(x, eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: dimension i pairs with i + D/2. float32 throughout."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The attention of one request: q [n, H, D], k and v [kv, KV, D], visible [n, kv] -> [n, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))  # [kv, H, D]
    logits = torch.einsum("nhd,khd->hnk", q.float(), k) * scale
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    out = torch.einsum("hnk,khd->nhd", weights, v).to(q.dtype)
    return out.masked_fill(~visible.any(dim=1)[:, None, None], 0)  # only rows that see nothing


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 with wraparound."""
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift (torch's is arithmetic: the copied sign bits are masked off)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >> 63 else value
