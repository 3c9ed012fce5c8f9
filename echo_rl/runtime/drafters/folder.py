"""Reads and writes the EAGLE-3 drafter as data: its configuration, its tensors, and the folder both live in.

Knows the published EAGLE-3 layout (``config.json`` + ``model.safetensors``) and checks every name and
shape on the way in and out, because the engines that read this layout skip unknown names silently.
How other makers write the layout is known to `variants`. Knows nothing about how the drafter is run
(`echo_rl.runtime.drafters.eagle3`) or trained (`echo_rl.drafting`).

The model, for a token pair at position i:

* ``f = fc(cat(taps_i))`` where ``taps_i`` are hidden states of the target at position i,
* ``x = cat(input_layernorm(embed(t_{i+1})), hidden_norm(f))``  (twice as wide as the hidden state),
* ``h = f + o_proj(attention(q(x), k(x), v(x)))`` with rotary position i,
* ``h = h + mlp(post_attention_layernorm(h))``,
* ``logits = lm_head(norm(h))`` over the draft vocabulary: they predict ``t_{i+2}``.

At the next level ``h`` (before ``norm``) takes the place of ``f``; the embedding table is the target's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from echo_rl.errors import DrafterMismatch, WeightsError
from echo_rl.runtime.drafters.variants import WEIGHTS_FILE, canonical, refuse_variants, require_safetensors
from echo_rl.runtime.models.checkpoint import read_tensors
from echo_rl.runtime.models.documents import Document, read_document
from echo_rl.utils.files import replacing

ARCHITECTURE = "LlamaForCausalLMEagle3"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class DrafterConfig:
    """Sizes of a drafter. `taps` names layers of the *target*.

    Tap k is the residual stream *after* layer k (layers count from 0), which is what enters layer k + 1.
    This is the meaning that SGLang gives to ``eagle_aux_hidden_state_layer_ids`` (it adds 1 to each id and
    captures what enters that layer). The output of the target's last layer enters no layer, so SGLang
    cannot capture it: an n-layer target has taps 0 .. n - 2, and `check_target` refuses others.
    """

    hidden: int
    target_hidden: int
    target_vocab: int
    taps: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    draft_vocab: int
    rope_theta: float = 10000.0
    eps: float = 1e-5
    max_positions: int = 2048

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.target_hidden, self.target_vocab, self.heads, self.kv_heads, self.head_dim)
        if min(*sizes, self.intermediate, self.draft_vocab, self.max_positions) < 1:
            raise WeightsError(f"every size of a drafter must be positive: {self}")
        if self.heads % self.kv_heads:
            raise WeightsError(f"{self.heads} heads cannot share {self.kv_heads} kv heads; use a divisor")
        if self.head_dim % 2:
            raise WeightsError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.draft_vocab > self.target_vocab:
            raise WeightsError(f"draft vocabulary {self.draft_vocab} exceeds the target's {self.target_vocab}")
        if not self.taps or min(self.taps) < 0 or list(self.taps) != sorted(set(self.taps)):
            raise WeightsError(f"taps are {list(self.taps)}; give distinct layers of the target in rising order")
        if self.hidden != self.target_hidden:
            raise DrafterMismatch(
                f"drafter hidden size {self.hidden} differs from the target's {self.target_hidden}; the drafter reads "
                "the target's embeddings, so train it at the target's width"
            )

    def check_target(self, *, hidden: int, vocab: int, layers: int) -> None:
        """Raise `DrafterMismatch` unless this drafter fits a target of these sizes."""
        remedy = "use a drafter that was trained for this target"
        if hidden != self.target_hidden:
            raise DrafterMismatch(f"drafter reads hidden size {self.target_hidden}, the target has {hidden}; {remedy}")
        if vocab != self.target_vocab:
            raise DrafterMismatch(f"drafter maps into {self.target_vocab} tokens, the target has {vocab}; {remedy}")
        if max(self.taps) > layers - 2:
            raise DrafterMismatch(f"drafter taps layer {max(self.taps)}; the target allows 0..{layers - 2}; {remedy}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the folder that is required."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "self_attn.q_proj.weight": (q, 2 * h),
            "self_attn.k_proj.weight": (kv, 2 * h),
            "self_attn.v_proj.weight": (kv, 2 * h),
            "self_attn.o_proj.weight": (h, q),
            "mlp.gate_proj.weight": (self.intermediate, h),
            "mlp.up_proj.weight": (self.intermediate, h),
            "mlp.down_proj.weight": (h, self.intermediate),
            "input_layernorm.weight": (h,),
            "hidden_norm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        return {
            "fc.weight": (h, len(self.taps) * self.target_hidden),
            **{f"midlayer.{name}": shape for name, shape in layer.items()},
            "norm.weight": (h,),
            "lm_head.weight": (self.draft_vocab, h),
            "d2t": (self.draft_vocab,),
        }

    def to_json(self) -> dict[str, Any]:
        """The Llama-style ``config.json`` that EAGLE-3 engines read."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "target_hidden_size": self.target_hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.target_vocab,
            "draft_vocab_size": self.draft_vocab,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.taps), "use_aux_hidden_state": True},
        }

    @classmethod
    def from_json(cls, config: Document, *, target_layers: int | None = None) -> DrafterConfig:
        """Read a ``config.json``. `target_layers` is needed only where the file names no taps.

        Raises `WeightsError` for another architecture, a missing key, or a feature that this layout has not.
        """
        data = config.values
        if data.get("architectures") != [ARCHITECTURE]:
            raise WeightsError(f"architectures is {data.get('architectures')}; EAGLE-3 has [{ARCHITECTURE!r}]")
        if data.get("num_hidden_layers", 1) != 1:
            raise WeightsError(f"num_hidden_layers is {data['num_hidden_layers']}; an EAGLE-3 drafter has 1 layer")
        if data.get("attention_bias") or data.get("mlp_bias"):
            raise WeightsError("attention_bias and mlp_bias must be false: the drafter's projections have no bias")
        refuse_variants(config)
        taps = config.section("eagle_config").ids("eagle_aux_hidden_state_layer_ids")
        hidden, heads, vocab = (config.count(key) for key in ("hidden_size", "num_attention_heads", "vocab_size"))
        same_vocab = data.get("draft_vocab_size", 0) is None
        return cls(
            hidden=hidden,
            target_hidden=config.count("target_hidden_size", hidden),
            target_vocab=vocab,
            taps=default_taps(target_layers) if taps is None else taps,
            heads=heads,
            kv_heads=config.count("num_key_value_heads", heads),
            head_dim=config.count("head_dim", hidden // heads),
            intermediate=config.count("intermediate_size"),
            draft_vocab=vocab if same_vocab else config.count("draft_vocab_size"),
            rope_theta=_rope_theta(config),
            eps=config.number("rms_norm_eps", 1e-5),
            max_positions=config.count("max_position_embeddings", 2048),
        )


def _rope_theta(config: Document) -> float:
    """Rotary base from either place that it is kept in. Scaled variants are refused, not ignored."""
    scaling = config.section("rope_scaling", "rope_parameters")
    if scaling.values.get("rope_type", scaling.values.get("type", "default")) != "default":
        raise WeightsError(f"rope scaling {scaling.values} is not supported; use a drafter with plain rotary positions")
    return config.number("rope_theta", scaling.number("rope_theta", 10000.0))


def default_taps(target_layers: int | None) -> tuple[int, ...]:
    """The taps of a drafter whose config names none: what enters layers 2, n // 2 and n - 3 of an n-layer target."""
    if target_layers is None:
        raise WeightsError(f"{CONFIG_FILE} names no taps; pass target_layers so that the usual ones can be used")
    return (1, target_layers // 2 - 1, target_layers - 4)


def draft_to_target(d2t: Tensor) -> Tensor:
    """[draft_vocab] int64 target ids of the draft ids, from the stored offsets."""
    return d2t.long() + torch.arange(d2t.shape[0])


def offsets_of(ids: Tensor) -> Tensor:
    """``d2t`` offsets of ascending target ids: the inverse of `draft_to_target`."""
    return ids.long() - torch.arange(ids.shape[0])


def check_tensors(config: DrafterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` unless `tensors` holds exactly the drafter's tensors, well shaped and finite."""
    shapes = config.shapes()
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys() - {"t2d"}
    if missing or unknown:
        raise WeightsError(
            f"drafter tensors do not match the layout: missing {sorted(missing)}, unknown {sorted(unknown)}; "
            "export the drafter again in the EAGLE-3 layout"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(
                f"{name} is {tuple(tensors[name].shape)} but {CONFIG_FILE} implies {shape}; "
                "the two files are of different drafters"
            )
        if name != "d2t" and not bool(torch.isfinite(tensors[name]).all()):
            raise WeightsError(f"{name} holds NaN or infinite values; the checkpoint is damaged, use an earlier one")
    _check_vocabulary(config, tensors)


def _check_vocabulary(config: DrafterConfig, tensors: Mapping[str, Tensor]) -> None:
    if tensors["d2t"].dtype not in (torch.int32, torch.int64):
        raise WeightsError(f"d2t is {tensors['d2t'].dtype}; it must hold integer offsets")
    ids = draft_to_target(tensors["d2t"])
    if bool((ids < 0).any()) or bool((ids >= config.target_vocab).any()) or ids.unique().numel() != ids.numel():
        raise WeightsError(f"d2t must map to distinct ids below {config.target_vocab}; use this target's drafter")
    if "t2d" in tensors:
        expected = torch.zeros(config.target_vocab, dtype=torch.bool).index_fill(0, ids, True)
        if not torch.equal(tensors["t2d"].bool(), expected):
            raise WeightsError("t2d contradicts d2t; export the drafter again")


def save_drafter(folder: str | Path, config: DrafterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the folder atomically, file by file. `t2d` (target vocabulary mask) is added where absent."""
    check_tensors(config, tensors)
    folder = Path(folder)
    mask = torch.zeros(config.target_vocab, dtype=torch.bool).index_fill(0, draft_to_target(tensors["d2t"]), True)
    out = {name: tensor.detach().contiguous() for name, tensor in tensors.items()} | {"t2d": mask}
    with replacing(folder / WEIGHTS_FILE) as part:
        save_file(out, part)
    with replacing(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(config.to_json(), indent=2) + "\n")


def load_drafter(folder: str | Path, *, target_layers: int | None = None) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """Read and verify a drafter folder. `target_layers` is needed only where its config names no taps.

    Safetensors in one file or in shards, in any floating-point type, under the names that
    `canonical` knows. Raises
    `WeightsError` (missing or broken file, missing or unknown tensor, wrong shape) or `DrafterMismatch`
    (drafter of another width than its target).
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise WeightsError(f"no {CONFIG_FILE} in {folder}; point to an EAGLE-3 drafter folder")
    require_safetensors(folder)
    config = DrafterConfig.from_json(read_document(folder / CONFIG_FILE), target_layers=target_layers)
    tensors = canonical(read_tensors(folder), config.shapes(), (config.target_vocab, config.hidden))
    check_tensors(config, tensors)
    return config, tensors
