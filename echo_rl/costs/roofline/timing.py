"""Models the seconds of a verify pass and of drafting on one node, from what they compute and what they move.

Each operation takes the longer of its arithmetic and its memory traffic; a pass is the sum of its operations, of its
collectives and of a fixed time a kernel. Nothing overlaps, caches hold nothing from one operation to the next, and all
GPUs of the node are alike. Source of the form: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009; of the
tensor-parallel split: Shoeybi et al., arXiv 1909.08053.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from echo_rl.costs.roofline.hardware import Assumptions, Hardware
from echo_rl.costs.roofline.models import FUSED_STATES, Model, Sizes
from echo_rl.errors import ConfigError

Dtype = Literal["bfloat16", "fp8"]
WEIGHT_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "fp8": 1})
STATE_BYTES = 2
"""Activations, KV and logits are bf16 whatever the weights are."""
SAMPLED_BYTES = 4
"""A logit is read once more in float32 to take its row's largest."""
REDUCTIONS = 2
"""All-reduces a layer: after attention and after the MLP."""
DENSE_KERNELS, EXPERT_KERNELS, LEVEL_KERNELS = 10, 14, 8
"""Kernels of a layer, of one with experts, and of a drafted level besides its layer (top-k, gathers, the mask)."""
RESERVE = 0.9
"""Share of the memory that weights may fill."""
COMMITTED = 2
"""Tokens a request that the drafter reads at a tree's first level, as `CostProfile.draft` takes for granted."""


@dataclass(frozen=True)
class Parts:
    """Seconds of one pass."""

    linear: float
    """Projections, and the dense MLP."""
    attention: float
    experts: float
    head: float
    reduce: float
    """Collectives."""
    launch: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.experts + self.head + self.reduce + self.launch


@dataclass(frozen=True)
class Roofline:
    """A model on `tp` GPUs. Raises `ConfigError` where it can't be split so, or its weights don't fit."""

    hardware: Hardware
    model: Model
    tp: int = 1
    dtype: Dtype = "bfloat16"
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        target, drafter = self.model.target, self.model.drafter
        if self.dtype not in WEIGHT_BYTES:
            raise ConfigError(f"dtype is '{self.dtype}'; give {' or '.join(WEIGHT_BYTES)}")
        if self.tp < 1 or any(s.heads % self.tp or s.mlp % self.tp for s in (target, drafter)):
            widths = f"{target.heads} heads and MLP widths {target.mlp} and {drafter.mlp}"
            raise ConfigError(f"tp is {self.tp}; give a divisor of {self.model.name}'s {widths}")
        weights = (target.parameters + drafter.parameters + self.model.fusion) * WEIGHT_BYTES[self.dtype]
        if weights > RESERVE * self.hardware.memory * self.tp:
            raise ConfigError(
                f"{self.model.name} has {weights / 1e9:.0f} GB of weights; {self.tp} {self.hardware.title} hold "
                f"{RESERVE * self.hardware.memory * self.tp / 1e9:.0f}: give a larger tp, or fp8"
            )

    @cached_property
    def flops(self) -> float:
        """Assumed FLOP/s of one GPU in large products."""
        peak = self.hardware.fp8 if self.dtype == "fp8" else self.hardware.bf16
        return peak * (self.hardware.compute_share if self.assumed.compute is None else self.assumed.compute)

    @cached_property
    def bandwidth(self) -> float:
        """Assumed bytes of memory a second of one GPU."""
        return self.hardware.bandwidth * self.assumed.memory

    def verify(self, batch: int, rows: int, context: float) -> Parts:
        """A pass of `rows` rows in all for `batch` requests of `context` tokens, with logits for every row."""
        return self._pass(self.model.target, batch, rows, rows, context)

    def draft(self, batch: int, width: int, depth: int, context: float) -> float:
        """Seconds of a tree of `depth` levels: the first reads what was committed, each other expands `width` nodes."""
        drafter, read = self.model.drafter, COMMITTED * batch
        merged = self._product(read, self.model.fusion, FUSED_STATES * self.model.target.hidden + drafter.hidden)
        first = merged + self._pass(drafter, batch, read, batch, context).total
        later = self._pass(drafter, batch, width * batch, width * batch, context).total
        return first + (depth - 1) * later + depth * LEVEL_KERNELS * self.assumed.kernel

    def catch_up(self) -> float:
        """Seconds of each further token that the drafter reads: arithmetic alone, since it joins a product."""
        return 2.0 * (self.model.drafter.active + self.model.fusion) / self.tp / self.flops

    def prompt_share(self) -> float:
        """Arithmetic of a row without logits over that of one with them."""
        target = self.model.target
        return target.active / (target.active + target.hidden * target.vocabulary)

    def _pass(self, sizes: Sizes, batch: int, rows: int, sampled: int, context: float) -> Parts:
        kernels = EXPERT_KERNELS if sizes.experts else DENSE_KERNELS
        dense = 0.0 if sizes.experts else self._mlp(sizes, rows)
        reduced = REDUCTIONS * self._collective(2.0 * rows * sizes.hidden * STATE_BYTES)
        return Parts(
            linear=sizes.layers * (self._projections(sizes, rows) + dense),
            attention=sizes.layers * self._attention(sizes, batch, rows, context),
            experts=sizes.layers * self._experts(sizes, rows),
            head=self._head(sizes, sampled),
            reduce=sizes.layers * reduced + self._collective(float(sampled) * sizes.vocabulary * STATE_BYTES),
            launch=sizes.layers * kernels * self.assumed.kernel,
        )

    def _projections(self, sizes: Sizes, rows: int) -> float:
        """Queries, keys and values, then the output; KV heads are copied where there are fewer of them than GPUs."""
        query, kv = sizes.heads // self.tp * sizes.head_dim, self._kv_heads(sizes) * sizes.head_dim
        width, read = query + 2 * kv, sizes.inputs * sizes.hidden
        return self._product(rows, read * width, read + width) + self._product(
            rows, query * sizes.hidden, query + sizes.hidden
        )

    def _mlp(self, sizes: Sizes, rows: int) -> float:
        width = sizes.mlp // self.tp
        up = self._product(rows, 2 * sizes.hidden * width, sizes.hidden + 2 * width)
        return up + self._product(rows, width * sizes.hidden, width + sizes.hidden)

    def _experts(self, sizes: Sizes, rows: int) -> float:
        """The router, and the chosen experts' products: each touched expert's weights are read once."""
        if sizes.experts is None:
            return 0.0
        routed, width = rows * sizes.experts.chosen, sizes.mlp // self.tp
        arithmetic = 2.0 * routed * sizes.feed_forward / self.tp / (self.flops * self.assumed.grouped)
        weights = sizes.experts.touched(rows) * sizes.feed_forward / self.tp * WEIGHT_BYTES[self.dtype]
        states = routed * (2 * sizes.hidden + 3 * width) * STATE_BYTES
        router = self._product(rows, sizes.hidden * sizes.experts.count, sizes.hidden + sizes.experts.count)
        return router + max(arithmetic, (weights + states) / self.bandwidth)

    def _attention(self, sizes: Sizes, batch: int, rows: int, context: float) -> float:
        """A request's KV is read once for all of its rows; each row attends to the whole context."""
        query = sizes.heads // self.tp * sizes.head_dim
        arithmetic = 4.0 * rows * context * query / (self.flops * self.assumed.attention)
        cached = batch * context * 2 * self._kv_heads(sizes) * sizes.head_dim
        return max(arithmetic, (cached + 2 * rows * query) * STATE_BYTES / self.bandwidth)

    def _head(self, sizes: Sizes, rows: int) -> float:
        part = sizes.vocabulary // self.tp
        product = self._product(rows, sizes.hidden * part, sizes.hidden + part)
        return product + rows * sizes.vocabulary * SAMPLED_BYTES / self.bandwidth

    def _product(self, rows: int, weights: int, states: int) -> float:
        """`rows` rows times `weights` parameters of one GPU; `states` values a row are read and written."""
        moved = weights * WEIGHT_BYTES[self.dtype] + rows * states * STATE_BYTES
        return max(2.0 * rows * weights / self.flops, moved / self.bandwidth)

    def _collective(self, size: float) -> float:
        """A gather of `size` bytes; an all-reduce is a scatter and a gather, so give it twice its size."""
        if self.tp == 1:
            return 0.0
        sent = size * (self.tp - 1) / self.tp
        return self.assumed.collective + sent / (self.hardware.link * self.assumed.link)

    def _kv_heads(self, sizes: Sizes) -> int:
        return max(1, sizes.kv_heads // self.tp)
