"""Lists the sizes of the modelled targets and of their EAGLE-3 drafters.

Targets: the published ``config.json`` of meta-llama/Llama-3.1-8B-Instruct, meta-llama/Llama-3.3-70B-Instruct and
Qwen/Qwen3-235B-A22B. Drafters: that of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, and SpecForge's configurations
``llama3-70B-ealge3.json`` and ``qwen3-235B-A22B-eagle3.json``. An EAGLE-3 drafter is one decoder layer whose attention
reads an embedding beside the hidden state (twice the width), a product that merges three of the target's hidden states
into one, and a head over a vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DRAFT_VOCABULARY = 32_000
FUSED_STATES = 3
"""Hidden states of the target that an EAGLE-3 drafter merges."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense MLP."""

    count: int
    chosen: int
    """Experts a token."""

    def touched(self, rows: float) -> float:
        """Expected distinct experts of `rows` tokens, if each token's choice were uniform and its own.

        ``count * (1 - (1 - chosen / count) ** rows)``: the more tokens, the more of the layer's weights are read.
        Real routers are skewed and related tokens choose alike, so this is an upper estimate.
        """
        return self.count * (1.0 - (1.0 - self.chosen / self.count) ** rows)


@dataclass(frozen=True)
class Sizes:
    """A stack of decoder layers with a head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the gated MLP, of one expert where there are experts."""
    vocabulary: int
    experts: Experts | None = None
    inputs: int = 1
    """Hidden states that attention reads side by side: 2 in an EAGLE-3 drafter."""

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        projections = self.inputs * self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return projections + self.heads * self.head_dim * self.hidden

    @property
    def feed_forward(self) -> int:
        """Parameters of one MLP, or of one expert."""
        return 3 * self.hidden * self.mlp

    @property
    def parameters(self) -> int:
        """All parameters, those of one embedding and one head included."""
        copies = self.experts.count if self.experts else 1
        router = self.hidden * self.experts.count if self.experts else 0
        layer = self.attention + copies * self.feed_forward + router
        return self.layers * layer + 2 * self.vocabulary * self.hidden

    @property
    def active(self) -> int:
        """Parameters that one row is multiplied by, without the head."""
        copies = self.experts.chosen if self.experts else 1
        return self.layers * (self.attention + copies * self.feed_forward)


@dataclass(frozen=True)
class Model:
    """A target with its drafter."""

    name: str
    target: Sizes
    drafter: Sizes

    @property
    def fusion(self) -> int:
        """Parameters of the drafter's product over the target's hidden states."""
        return FUSED_STATES * self.target.hidden * self.drafter.hidden


def _drafter(target: Sizes, mlp: int) -> Sizes:
    return Sizes(
        1, target.hidden, target.heads, target.kv_heads, target.head_dim, mlp, DRAFT_VOCABULARY, inputs=2
    )  # fmt: skip


_LLAMA_8B = Sizes(32, 4096, 32, 8, 128, 14_336, 128_256)
_LLAMA_70B = Sizes(80, 8192, 64, 8, 128, 28_672, 128_256)
_QWEN3_235B = Sizes(94, 4096, 64, 4, 128, 1_536, 151_936, Experts(128, 8))

MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "llama-3.1-8b": Model("llama-3.1-8b", _LLAMA_8B, _drafter(_LLAMA_8B, 14_336)),
        "llama-3.3-70b": Model("llama-3.3-70b", _LLAMA_70B, _drafter(_LLAMA_70B, 28_672)),
        "qwen3-235b-a22b": Model("qwen3-235b-a22b", _QWEN3_235B, _drafter(_QWEN3_235B, 24_576)),
    }
)
"""The modelled targets by name."""
