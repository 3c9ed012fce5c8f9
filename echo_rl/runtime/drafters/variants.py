"""Reads EAGLE-3 folders of other makers: translates names that mean the same, refuses features that don't.

A name that means the same is read under this project's; a feature that would change the arithmetic is
refused, never ignored. Knows no sizes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from echo_rl.errors import WeightsError
from echo_rl.runtime.models.documents import Document

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

VARIANTS: Mapping[str, str] = {
    "norm_output": "feeds its normed output to the next level",
    "norm_before_fc": "norms the features before fc",
    "fc_norm": "norms each feature before fc",
    "use_aux_norm": "norms each feature before fc",
    "bias": "adds a bias in fc",
    "tie_word_embeddings": "takes its head from the embeddings",
    "quantization_config": "has quantised weights",
}
"""Config flags of drafters that compute something else, some of them without a tensor to tell by."""


def refuse_variants(config: Document) -> None:
    """Raises `WeightsError` where a ``config.json`` asks for another computation than the plain EAGLE-3 drafter's."""
    data, eagle = config.values, config.section("eagle_config").values
    for flag, what in VARIANTS.items():
        if data.get(flag) or eagle.get(flag):
            raise WeightsError(f"{flag} is set: the drafter {what}, which isn't supported; use a plain EAGLE-3 drafter")
    if data.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"hidden_act is {data['hidden_act']!r}; an EAGLE-3 drafter has 'silu'")
    if eagle.get("use_aux_hidden_state") is False:
        raise WeightsError("use_aux_hidden_state is false: the drafter reads one layer as EAGLE-1 does; use EAGLE-3")


def canonical(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], embeddings: tuple[int, int]
) -> dict[str, Tensor]:
    """The tensors under the layout's names.

    Other makers prefix ``model.``, call the layer ``layers.0``, keep a copy of the target's embedding table (which is
    dropped: drafting uses the target's own), or leave out ``d2t`` where both vocabularies are the same. `shapes`
    are the layout's, `embeddings` the table's. Raises `WeightsError` where two names mean one tensor or the
    table has another shape.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("model.")
        own = f"midlayer.{own.removeprefix('layers.0.')}" if own.startswith("layers.0.") else own
        if own in named:
            raise WeightsError(f"two tensors mean {own}; export the drafter again")
        named[own] = tensor
    table = named.pop("embed_tokens.weight", None)
    if table is not None and tuple(table.shape) != embeddings:
        raise WeightsError(
            f"embed_tokens.weight is {tuple(table.shape)}, the config implies {embeddings}; use this target's drafter"
        )
    if "d2t" not in named and shapes["d2t"] == embeddings[:1]:
        named["d2t"] = torch.zeros(embeddings[0], dtype=torch.int64)
    return named


def require_safetensors(folder: Path) -> None:
    """Raises `WeightsError`, with the remedy, where the weights are pickled or absent."""
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{folder} holds {', '.join(pickled)}: pickles, which can run code when read; convert them where you trust "
            f"them, with torch.load(..., weights_only=True) and safetensors.torch.save_file into {WEIGHTS_FILE}"
        )
    raise WeightsError(f"no {WEIGHTS_FILE} in {folder}; point to an EAGLE-3 drafter folder")
