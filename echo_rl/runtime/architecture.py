"""What a Hugging Face `config.json` says about a decoder, read into one frozen record.

Knows Llama, Qwen2 and Qwen3; everything else is refused by name rather than run wrongly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echo_rl.errors import WeightsError

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


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
    rope_scaling: Mapping[str, Any] | None
    max_positions: int
    tied: bool
    eos: tuple[int, ...]


def read_architecture(folder: Path) -> Architecture:
    """Read `config.json` (and `generation_config.json` for EOS ids). Raises `WeightsError` naming the remedy."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json; give a Hugging Face model folder or 'smollm2'")
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise WeightsError(f"{path} is not valid JSON ({e}); download the model again") from e
    name = (config.get("architectures") or ["none"])[0]
    if name not in SUPPORTED:
        raise WeightsError(f"architecture '{name}' is not supported; use a model of {', '.join(SUPPORTED)}")
    if config.get("use_sliding_window"):
        raise WeightsError(f"{name} with use_sliding_window is not supported; set it to false for full attention")
    if config.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"activation '{config['hidden_act']}' is not supported; use a model with silu")
    try:
        return _architecture(name, config, _eos_ids(folder, config))
    except KeyError as e:
        raise WeightsError(f"{path} lacks the key {e}; download the model again") from e


def _architecture(name: str, config: Mapping[str, Any], eos: tuple[int, ...]) -> Architecture:
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if kind not in ("default", "llama3"):
        raise WeightsError(f"rope type '{kind}' is not supported; use a model with default or llama3 rope")
    heads = config["num_attention_heads"]
    return Architecture(
        name=name,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
        rope_scaling=scaling if kind == "llama3" else None,
        max_positions=config.get("max_position_embeddings", 2_048),
        tied=bool(config.get("tie_word_embeddings", False)),
        eos=eos,
    )


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


def rope_table(
    head_dim: int, theta: float, positions: int, scaling: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables, each [positions, head_dim] float32, half-split layout."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is not None:
        inverse = _llama3_scaled(inverse, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _llama3_scaled(inverse: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's frequency scaling: long wavelengths are divided by `factor`, middle ones blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse / factor * (1 - blend) + inverse * blend
