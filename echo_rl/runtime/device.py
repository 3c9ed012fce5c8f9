"""Resolves device and dtype once, at load."""

from __future__ import annotations

import torch

from echo_rl.errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cpu_has_bf16() -> bool:
    """True where this CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def resolve(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`auto` means CUDA bf16, else CPU bf16 where native, else CPU fp32.

    Raises `ConfigError` for a GPU that isn't there, and for float16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda' but torch sees no CUDA device; use device='cpu' or install a CUDA build of torch"
        )
    index = torch.device(device).index or 0
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs; give a lower number")
    if device == "cpu" and dtype == "float16":
        raise ConfigError("float16 is for GPUs; give bfloat16 or float32 on a CPU")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") or cpu_has_bf16() else "float32"
    return torch.device(device), _DTYPES[dtype]
