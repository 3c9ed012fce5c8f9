"""The EAGLE-3 drafter's folder: configuration, tensor names and shapes, saving and checked loading.

The layout is the common one (`LlamaForCausalLMEagle3`), so a drafter trained here loads in SGLang and
one made elsewhere loads here. A tensor that is missing, unknown or of another shape is an error here:
other loaders skip such tensors silently.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from echo_rl.errors import WeightsError
from echo_rl.runtime.checkpoint import read_tensors

ARCHITECTURE = "LlamaForCausalLMEagle3"


@dataclass(frozen=True)
class DrafterConfig:
    """Shapes and constants of a drafter.

    `taps` are target layers, counted from 0: the features are the hidden states *after* these layers
    (after the residual addition, before the next layer's norm). In the folder they are stored as
    `eagle_aux_hidden_state_layer_ids`, with the same meaning.
    """

    hidden: int
    target_hidden: int
    taps: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    draft_vocab: int
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    max_positions: int = 2_048

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every floating-point tensor by name."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
        return {
            "fc.weight": (h, len(self.taps) * self.target_hidden),
            f"{attention}q_proj.weight": (q, 2 * h),
            f"{attention}k_proj.weight": (kv, 2 * h),
            f"{attention}v_proj.weight": (kv, 2 * h),
            f"{attention}o_proj.weight": (h, q),
            f"{mlp}gate_proj.weight": (self.intermediate, h),
            f"{mlp}up_proj.weight": (self.intermediate, h),
            f"{mlp}down_proj.weight": (h, self.intermediate),
            "midlayer.input_layernorm.weight": (h,),
            "midlayer.hidden_norm.weight": (h,),
            "midlayer.post_attention_layernorm.weight": (h,),
            "norm.weight": (h,),
            "lm_head.weight": (self.draft_vocab, h),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "target_hidden_size": self.target_hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "vocab_size": self.vocab,
            "draft_vocab_size": self.draft_vocab,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(self.taps),
                "use_aux_hidden_state": True,
            },
        }

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DrafterConfig:
        """Raises `WeightsError` for another architecture or a missing key."""
        name = (config.get("architectures") or ["none"])[0]
        if name != ARCHITECTURE:
            raise WeightsError(
                f"the drafter's architecture is '{name}'; only EAGLE-3 folders ({ARCHITECTURE}) are loaded"
            )
        taps = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        try:
            heads = config["num_attention_heads"]
            return cls(
                hidden=config["hidden_size"],
                target_hidden=config.get("target_hidden_size") or config["hidden_size"],
                taps=tuple(taps) if taps else _default_taps(config),
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                intermediate=config["intermediate_size"],
                vocab=config["vocab_size"],
                draft_vocab=config.get("draft_vocab_size") or config["vocab_size"],
                rope_theta=float(config.get("rope_theta") or 10_000.0),
                eps=config.get("rms_norm_eps", 1e-5),
                max_positions=config.get("max_position_embeddings", 2_048),
            )
        except KeyError as e:
            raise WeightsError(f"the drafter's config.json lacks the key {e}; download or train it again") from e


def _default_taps(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Without explicit ids the taps enter layers 2, n/2 and n - 3 of an n-layer target, so follow the layers before."""
    layers = config.get("target_num_hidden_layers")
    if not layers:
        raise WeightsError(
            "the drafter's config.json names no taps; add eagle_config.eagle_aux_hidden_state_layer_ids "
            "(the target layers whose outputs it reads)"
        )
    return (1, layers // 2 - 1, layers - 4)


def load_drafter(folder: Path) -> tuple[DrafterConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors, every name and shape checked. Raises `WeightsError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} has no config.json; give an EAGLE-3 drafter folder")
    try:
        config = DrafterConfig.from_json(json.loads(path.read_text()))
    except json.JSONDecodeError as e:
        raise WeightsError(f"{path} is not valid JSON ({e}); download or train the drafter again") from e
    tensors = read_tensors(folder)
    tensors.pop("t2d", None)  # derivable from d2t
    if "d2t" not in tensors and config.draft_vocab == config.vocab:
        tensors["d2t"] = torch.zeros(config.vocab, dtype=torch.int64)
    check_tensors(config, tensors)
    return config, tensors


def check_tensors(config: DrafterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `WeightsError` unless the tensors are exactly those that the configuration implies."""
    expected = {**config.shapes(), "d2t": (config.draft_vocab,)}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise WeightsError(f"the drafter lacks {', '.join(missing)}; download or train it again")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise WeightsError(f"the drafter holds tensors of another architecture: {', '.join(unknown[:4])}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(
                f"drafter tensor '{name}' has shape {tuple(tensors[name].shape)}, config.json implies {shape}"
            )
    ids = tensors["d2t"].long() + torch.arange(config.draft_vocab)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab:
        raise WeightsError("the drafter's d2t points outside the target's vocabulary; it belongs to another target")


def save_drafter(folder: Path, config: DrafterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the folder atomically. `tensors` are all of `config.shapes()` and ``d2t`` (int64 offsets)."""
    check_tensors(config, tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    t2d = torch.zeros(config.vocab, dtype=torch.bool)
    t2d[tensors["d2t"].long() + torch.arange(config.draft_vocab)] = True
    save_file({**{n: t.contiguous() for n, t in tensors.items()}, "t2d": t2d}, scratch / "model.safetensors")
    (scratch / "config.json").write_text(json.dumps(config.to_json(), indent=2))
    if folder.exists():
        for file in scratch.iterdir():
            os.replace(file, folder / file.name)
        scratch.rmdir()
    else:
        scratch.chmod(0o755)
        shutil.move(scratch, folder)
