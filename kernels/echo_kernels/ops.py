"""Checks the operations: each validates shapes and dtypes, then calls its backend.

The checks raise ValueError (shapes, values that cost nothing to read) and TypeError (dtypes), and
read no tensor's content: an index that points outside a cache raises IndexError from a CPU backend,
and is undefined behaviour on a GPU, where looking would stop the device.
Knows nothing of how a backend computes, nor of which one was chosen (`echo_kernels.dispatch`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echo_kernels.checks import need, need_dtype, need_float, need_matrix, need_rows
from echo_kernels.interface import Implementation


class Ops:
    """The operations of one backend. Build it with `echo_kernels.ops_for`.

    All float tensors of a call share one dtype and every tensor lies on one device and is
    contiguous, unless an operation says otherwise.
    """

    def __init__(self, implementation: Implementation, name: str, dtypes: frozenset[torch.dtype]) -> None:
        self.name = name
        """``triton``, ``cpp`` or ``reference``."""
        self._dtypes = dtypes
        self._impl = implementation

    @property
    def trusted(self) -> Implementation:
        """The same operations without their checks, which take as long as a small kernel does.

        For calls whose arguments are known to be sound: shaped and laid out like those of a call that was
        checked. Others may read or write memory that isn't theirs. Arguments go by place, none is left out.
        """
        return self._impl

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, H], weight [H] -> [N, H].

        float32 inside; the normalised row is rounded to x.dtype, then multiplied by the weight (the
        rounding order of Hugging Face's Llama).
        """
        need_float("x", x, self._dtypes)
        need_matrix("x", x)
        _need_weight("weight", weight, x.shape[1], x)
        return self._impl.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, residual [N, H] -> (normed [N, H], new residual [N, H]).

        **Writes residual + x into `residual`** (rounded to its dtype) and returns that same tensor
        as the second result; the first is `rms_norm` of it. x is left alone.
        """
        need_float("x", x, self._dtypes)
        need_matrix("x", x)
        need_matrix("residual", residual)
        need_dtype("residual", residual, x.dtype)
        if residual.shape != x.shape:
            need(False, f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; give equal shapes")
        _need_weight("weight", weight, x.shape[1], x)
        return self._impl.add_rms_norm(x, residual, weight, eps)

    def rope_store(
        self,
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
        """Splits qkv, rotates q and k, stores k and v; returns q [N, H, D].

        qkv [N, (H + 2 KV) D]; cos, sin [P, D] float32 (both halves filled, as Hugging Face's
        tables); positions [N] int64 rows of the tables; slots [N] int64 rows of the caches, -1 =
        do not store; k_cache, v_cache [S, KV, D], written in place. With q_weight / k_weight [D]
        each head is RMS-normalised first (Qwen3). float32 inside, rounded once.
        """
        need_float("qkv", qkv, self._dtypes)
        need_matrix("qkv", qkv)
        _need_caches(k_cache, v_cache, qkv)
        n, width = qkv.shape
        _, kv_heads, dim = k_cache.shape
        if width != (num_heads + 2 * kv_heads) * dim or dim % 2:
            need(
                False,
                f"qkv has width {width}; expected (num_heads {num_heads} + 2 * {kv_heads} KV heads) * "
                f"head size {dim} (even) from num_heads and k_cache",
            )
        need_dtype("cos", cos, torch.float32)
        need_dtype("sin", sin, torch.float32)
        need_dtype("positions", positions, torch.int64)
        need_dtype("slots", slots, torch.int64)
        if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != dim:
            need(False, f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [P, {dim}]")
        if positions.shape != (n,) or slots.shape != (n,):
            need(False, f"positions {tuple(positions.shape)} and slots {tuple(slots.shape)} must both be [{n}]")
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight is not None:
                _need_weight(name, weight, dim, qkv)
        return self._impl.rope_store(
            qkv, cos, sin, positions, slots, k_cache, v_cache, num_heads, q_weight, k_weight, eps
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [N, 2 I] (gates, then ups) -> silu(gate) * up [N, I].

        silu is rounded to the dtype before the product, as Hugging Face's MLP does.
        """
        need_float("gate_up", gate_up, self._dtypes)
        need_matrix("gate_up", gate_up)
        if gate_up.shape[1] % 2:
            need(False, f"gate_up has width {gate_up.shape[1]}; expected an even width (gates, then ups)")
        return self._impl.silu_mul(gate_up)

    def tree_attention(
        self,
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
        """Paged, ragged attention under a tree mask, grouped queries. Returns [N, H, D].

        q [N, H, D]; caches [S, KV, D], H a multiple of KV; block_tables [B, max_blocks] int32;
        q_start [B + 1] int32, rising from 0 to N; ctx_lens, kv_lens [B] int32; mask [N, W] bool with
        W >= max(kv_lens - ctx_lens). Row n of request r (q_start[r] <= n < q_start[r + 1]) sees the
        logical positions p < ctx_lens[r], and p in [ctx_lens[r], kv_lens[r]) where
        mask[n, p - ctx_lens[r]]. Logical p lies at cache row
        block_tables[r, p // block_size] * block_size + p % block_size. A request may have no row. A
        row that sees nothing yields 0. NaN logits propagate. Softmax and sums are float32. block_tables
        and mask may be column slices of wider buffers.
        """
        need_float("q", q, self._dtypes)
        _need_caches(k_cache, v_cache, q)
        if q.dim() != 3 or not q.is_contiguous():
            need(False, f"q has shape {tuple(q.shape)}; expected a contiguous [N, H, D]")
        n, heads, dim = q.shape
        _, kv_heads, cache_dim = k_cache.shape
        if dim != cache_dim or heads % kv_heads:
            need(False, f"q is {tuple(q.shape)} but the caches hold {kv_heads} KV heads of size {cache_dim}")
        need_dtype("block_tables", block_tables, torch.int32)
        need_dtype("q_start", q_start, torch.int32)
        need_dtype("ctx_lens", ctx_lens, torch.int32)
        need_dtype("kv_lens", kv_lens, torch.int32)
        need_dtype("mask", mask, torch.bool)
        need_rows("block_tables", block_tables)
        need_rows("mask", mask)
        batch = block_tables.shape[0]
        if q_start.shape != (batch + 1,) or ctx_lens.shape != (batch,) or kv_lens.shape != (batch,):
            need(
                False,
                f"q_start {tuple(q_start.shape)}, ctx_lens {tuple(ctx_lens.shape)}, kv_lens "
                f"{tuple(kv_lens.shape)} must be [{batch + 1}], [{batch}], [{batch}] as block_tables has {batch} rows",
            )
        if mask.shape[0] != n:
            need(False, f"mask has {mask.shape[0]} rows, q has {n}; give one mask row a query row")
        if block_size < 1:
            need(False, f"block_size is {block_size}; give a positive count")
        return self._impl.tree_attention(
            q, k_cache, v_cache, block_tables, block_size, q_start, ctx_lens, kv_lens, mask, scale
        )

    def compact_kv(self, pools: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
        """pool[:, dst] = pool[:, src] for every pool [L, S, ...], in place.

        src, dst [K] int64. All of src is read before any of dst is written, so they may overlap;
        dst holds no row twice.
        """
        need_dtype("src", src, torch.int64)
        need_dtype("dst", dst, torch.int64)
        if src.dim() != 1 or src.shape != dst.shape:
            need(False, f"src {tuple(src.shape)} and dst {tuple(dst.shape)} must be [K] both")
        for i, pool in enumerate(pools):
            if pool.dim() < 2 or not pool.is_contiguous():
                need(False, f"pools[{i}] has shape {tuple(pool.shape)}; expected a contiguous [L, S, ...]")
        self._impl.compact_kv(pools, src, dst)

    def gumbel(self, seeds: Tensor, positions: Tensor, vocab: int, device: torch.device | str) -> Tensor:
        """Gumbel noise keyed by (seed, position, token id): seeds, positions [R] int64 -> [R, vocab] float32.

        Row r depends on its own key alone, so a batch's composition cannot change it. Every backend
        draws the same bits; the floats agree to a few units in the last place.
        """
        need_dtype("seeds", seeds, torch.int64)
        need_dtype("positions", positions, torch.int64)
        if seeds.dim() != 1 or seeds.shape != positions.shape:
            need(False, f"seeds {tuple(seeds.shape)} and positions {tuple(positions.shape)} must be [R] both")
        if vocab < 1:
            need(False, f"vocab is {vocab}; give a positive count")
        return self._impl.gumbel(seeds, positions, vocab, torch.device(device))

    def pack_weight(self, weight: Tensor) -> Tensor | None:
        """weight [N, K] laid out for `linear`: panels [N / 32, K / U, 32, U], element [p, k, c, h] being
        weight[32 p + c, U k + h].

        U is 2 and the panels are bfloat16 where that holds every weight exactly (float32 weights included: half the
        bytes to read, the same numbers), else U is 1 and the panels are float32. None where torch's own product is
        the better one or the only one: on other devices, N no multiple of 32, bfloat16 with odd K, and bfloat16 on
        processors with AMX.
        """
        need_float("weight", weight, self._dtypes)
        need_matrix("weight", weight)
        return self._impl.pack_weight(weight)

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [R, K] times a packed matrix, plus bias [N] -> [R, N] in x.dtype; the panels are bfloat16 or of x.dtype.

        Sums are float32 and rounded once. A row's result does not depend on the other rows.
        """
        need_float("x", x, self._dtypes)
        need_matrix("x", x)
        if panels.dtype is not torch.bfloat16:
            need_dtype("panels", panels, x.dtype)
        _need_panels(panels, x, 2 if panels.dtype is torch.bfloat16 else 1, "pack_weight")
        if bias is not None:
            _need_weight("bias", bias, 32 * panels.shape[0], x)
        return self._impl.linear(x, panels, bias)

    def pack_int8(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """weight [N, K] in eight bits, for `linear_int8`: (panels [N / 32, K / 4, 32, 4] uint8, scales [N] float32).

        Column n's weights are whole numbers from -127 to 127 times its scale, its largest magnitude / 127;
        element [p, k, c, h] is that of weight[32 p + c, 4 k + h], plus 128. None where the backend has no such
        product: on other devices and dtypes than bfloat16 on a CPU with AVX512-VNNI, N no multiple of 32, K none of 16.
        """
        need_float("weight", weight, self._dtypes)
        need_matrix("weight", weight)
        return self._impl.pack_int8(weight)

    def linear_int8(self, x: Tensor, panels: Tensor, scales: Tensor) -> Tensor:
        """x [R, K] bfloat16 times a matrix packed in eight bits -> [R, N].

        Each row is rounded to whole numbers from -127 to 127 times its own scale, its largest magnitude / 127.
        Sums of whole numbers are exact, so a row's result depends on nothing but the row. NaN and infinity make
        their whole row NaN.
        """
        need_float("x", x, self._dtypes)
        need_matrix("x", x)
        need_dtype("panels", panels, torch.uint8)
        need_dtype("scales", scales, torch.float32)
        _need_panels(panels, x, 4, "pack_int8")
        if scales.shape != (32 * panels.shape[0],):
            need(False, f"scales has shape {tuple(scales.shape)}; expected [{32 * panels.shape[0]}]")
        return self._impl.linear_int8(x, panels, scales)

    def best_token(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of some rows: logits [N, V], rows [R] int64 -> (tokens [R] int64, their logits [R]
        float32).

        Of equal logits the first wins. A row that holds a NaN gives NaN and token 0.
        """
        need_float("logits", logits, self._dtypes)
        need_matrix("logits", logits)
        need_dtype("rows", rows, torch.int64)
        if rows.dim() != 1:
            need(False, f"rows has shape {tuple(rows.shape)}; expected [R]")
        if not logits.shape[1]:
            need(False, "logits has no column; give a vocabulary")
        return self._impl.best_token(logits, rows)

    def top_tokens(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens of every row: logits [N, V] -> (log-probabilities [N, k] float32, tokens [N, k]).

        Tokens are int64. Best first; of equal logits the lower token. Log-probabilities are at most 0, and -inf
        in a row whose logits hold a NaN or +inf or nothing above -inf. A place of -inf names token 0.
        """
        need_float("logits", logits, self._dtypes)
        need_matrix("logits", logits)
        if not 1 <= k <= logits.shape[1]:
            need(False, f"k is {k}; give 1 to {logits.shape[1]}, the columns of logits")
        return self._impl.top_tokens(logits, k)


def _need_panels(panels: Tensor, x: Tensor, unit: int, packer: str) -> None:
    if panels.dim() != 4 or panels.shape[2:] != (32, unit) or not panels.is_contiguous():
        need(False, f"panels has shape {tuple(panels.shape)}; give what `{packer}` returned")
    if x.shape[1] != unit * panels.shape[1]:
        need(False, f"x has width {x.shape[1]}; the packed matrix takes {unit * panels.shape[1]}")


def _need_weight(name: str, weight: Tensor, width: int, like: Tensor) -> None:
    need_dtype(name, weight, like.dtype)
    if weight.shape != (width,):
        need(False, f"{name} has shape {tuple(weight.shape)}; expected [{width}]")


def _need_caches(k_cache: Tensor, v_cache: Tensor, like: Tensor) -> None:
    need_dtype("k_cache", k_cache, like.dtype)
    need_dtype("v_cache", v_cache, like.dtype)
    if k_cache.dim() != 3 or k_cache.shape != v_cache.shape:
        need(False, f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must be [S, KV, D] both")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        need(False, "k_cache and v_cache must be contiguous: they are written in place")
