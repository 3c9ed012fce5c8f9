"""Reads what a Hugging Face `config.json` says about a decoder into one frozen record.

Knows Llama, Qwen2 and Qwen3; everything else is refused by name rather than run wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from echo_rl.errors import WeightsError
from echo_rl.runtime.memory import allocating
from echo_rl.runtime.models.documents import Document, read_document

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder-only transformer with rotary embeddings and a gated MLP."""

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    rope_scaling: Mapping[str, float] | None
    """`LLAMA3_ROPE`, or None for plain rotary positions."""
    max_positions: int
    tied: bool | None
    """True where the output head is the embeddings; None: where the weights have no other."""
    attention_bias: bool
    """True where all four attention projections have a bias (Llama's and Qwen3's option)."""
    eos: tuple[int, ...]

    def ties(self, has_head: bool) -> bool:
        """True where the output head is the embeddings; `has_head` says whether the weights hold one of its own."""
        return not has_head if self.tied is None else self.tied

    @property
    def biased(self) -> bool:
        """True where queries, keys and values always have a bias."""
        return self.name == "Qwen2ForCausalLM" or self.attention_bias

    @property
    def normed(self) -> bool:
        """True where queries and keys are normed, head by head."""
        return self.name == "Qwen3ForCausalLM"


def read_architecture(folder: Path) -> Architecture:
    """Read `config.json` (and `generation_config.json` for EOS ids). Raises `WeightsError` naming the remedy."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json; give a Hugging Face model folder or 'smollm2'")
    document = read_document(path)
    config, name = document.values, _name(document)
    if name not in SUPPORTED:
        raise WeightsError(f"architecture '{name}' is not supported; use a model of {', '.join(SUPPORTED)}")
    if config.get("use_sliding_window"):
        raise WeightsError(f"{name} with use_sliding_window is not supported; set it to false for full attention")
    if config.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"activation '{config['hidden_act']}' is not supported; use a model with silu")
    return _architecture(name, document, _eos_ids(folder, document))


def _name(config: Document) -> str:
    names = config.values.get("architectures")
    return str(names[0]) if names and isinstance(names, list) else "none"


def _architecture(name: str, config: Document, eos: tuple[int, ...]) -> Architecture:
    rope, scaling = config.section("rope_parameters"), config.section("rope_scaling", "rope_parameters")
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise WeightsError(f"rope type '{kind}' is not supported; use a model with default or llama3 rope")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return Architecture(
        name=name,
        vocab=config.count("vocab_size"),
        hidden=hidden,
        intermediate=config.count("intermediate_size"),
        layers=config.count("num_hidden_layers"),
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=config.count("head_dim", hidden // heads),
        eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", config.number("rope_theta", 10_000.0)),
        rope_scaling={key: scaling.number(key) for key in LLAMA3_ROPE} if kind == "llama3" else None,
        max_positions=config.count("max_position_embeddings", 2_048),
        tied=None if (tied := config.values.get("tie_word_embeddings")) is None else bool(tied),
        attention_bias=name != "Qwen2ForCausalLM" and bool(config.values.get("attention_bias")),
        eos=eos,
    )


def _eos_ids(folder: Path, config: Document) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = read_document(generation).ids("eos_token_id") if generation.is_file() else None
    return (config.ids("eos_token_id") or ()) if eos is None else eos


def rope_table(
    head_dim: int, theta: float, positions: int, scaling: Mapping[str, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables, each [positions, head_dim] float32, half-split layout.

    Raises `ConfigError` where they don't fit the memory.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is not None:
        inverse = _llama3_scaled(inverse, scaling)
    with allocating("the table of rotary positions", "max_context"):
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _llama3_scaled(inverse: torch.Tensor, scaling: Mapping[str, float]) -> torch.Tensor:
    """Llama 3.1's frequency scaling: long wavelengths are divided by `factor`, middle ones blended."""
    factor, low, high, old = (scaling[key] for key in LLAMA3_ROPE)
    wavelength = 2 * math.pi / inverse
    blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse / factor * (1 - blend) + inverse * blend
