"""Reads the tensors of a Hugging Face folder (one safetensors file, or shards with an index)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from echo_rl.errors import WeightsError
from echo_rl.runtime.models.documents import read_document


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by name. Raises `WeightsError` where a file is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    shards = _shards(index) if index.is_file() else {}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(shards.values())) or ["model.safetensors"]:
        path = folder / file
        if not path.is_file():
            raise WeightsError(f"{path} is missing; only safetensors weights are loaded, download or convert the model")
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{path} is truncated or damaged ({e}); delete it and fetch it again") from e
    if absent := shards.keys() - tensors.keys():
        raise WeightsError(f"{index} names tensors that no file holds ({min(absent)}); download the model again")
    return tensors


def _shards(index: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    files = dict(read_document(index).section("weight_map").values)
    if not files or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(f"{index} is damaged (weight_map names no files); download the model again")
    return files


class TensorReader:
    """Hands out tensors by name with their shape checked, and knows which were never asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._device, self._dtype = device, dtype
        self._unread = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor on the target device and dtype. Raises `WeightsError` if absent or of another shape."""
        if name not in self._tensors:
            raise WeightsError(f"the checkpoint has no tensor '{name}'; it doesn't match its config.json")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"tensor '{name}' has shape {tuple(tensor.shape)}, config.json implies {shape}")
        self._unread.discard(name)
        return tensor.to(device=self._device, dtype=self._dtype)

    def take_if_there(self, name: str, *shape: int) -> torch.Tensor | None:
        return self.take(name, *shape) if name in self else None

    @property
    def unread(self) -> set[str]:
        return self._unread
