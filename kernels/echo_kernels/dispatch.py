"""Chooses the backend for a device, once. Knows how to load one, nothing of what it computes."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from echo_kernels import reference
from echo_kernels.build import BuildError, load_extension
from echo_kernels.ops import Ops

ENV_VAR = "ECHO_KERNELS"
"""Environment variable that forces a backend: ``triton``, ``cpp`` or ``reference``."""
CHOICES = ("triton", "cpp", "reference")
REFERENCE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
CPP_DTYPES = frozenset({torch.float32, torch.bfloat16})
TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
log = logging.getLogger(__name__)


class TritonMissing(RuntimeError):
    """Triton cannot be imported here; the message says the remedy."""


def backend(device: torch.device | str) -> str:
    """``triton``, ``cpp`` or ``reference``: what `ops_for` uses on this device.

    CUDA and ROCm devices take ``triton``, CPUs ``cpp``, all others ``reference``. Raises ValueError
    where ECHO_KERNELS names no backend or one that cannot run on the device, and `BuildError` or
    `TritonMissing` where it demands one that is not there. Left unset, a failed build or a missing
    triton falls back to ``reference`` with one logged warning.
    """
    return ops_for(device).name


def ops_for(device: torch.device | str) -> Ops:
    """The operations for a device (errors: see `backend`). Equal calls return the same object."""
    kind = torch.device(device).type
    forced = os.environ.get(ENV_VAR, "")
    if forced and forced not in CHOICES:
        raise ValueError(f"{ENV_VAR} is {forced!r}; give one of {', '.join(CHOICES)}, or unset it")
    if forced == "cpp" and kind != "cpu":
        raise ValueError(f"{ENV_VAR}=cpp runs on cpu only, the device is {kind}; unset {ENV_VAR}")
    if forced == "triton" and not (kind == "cuda" or (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(
            f"{ENV_VAR}=triton runs on cuda (ROCm included), the device is {kind}; unset {ENV_VAR}, "
            "or interpret the kernels on a cpu, slowly, with TRITON_INTERPRET=1"
        )
    if forced == "cpp":
        return _cpp_ops()
    if forced == "triton":
        return _triton_ops()
    if forced == "reference" or kind not in ("cpu", "cuda"):
        return _reference_ops()
    return _best_cpu_ops() if kind == "cpu" else _best_gpu_ops()


@cache
def _reference_ops() -> Ops:
    return Ops(reference, "reference", REFERENCE_DTYPES)


@cache
def _cpp_ops() -> Ops:
    return Ops(load_extension(), "cpp", CPP_DTYPES)


@cache
def _triton_ops() -> Ops:
    try:
        from echo_kernels import triton  # slow to import, and needs triton
    except ImportError as error:
        raise TritonMissing(f"triton cannot be imported ({error}); `pip install triton`, Linux only") from error
    return Ops(triton, "triton", TRITON_DTYPES)


@cache
def _best_cpu_ops() -> Ops:
    try:
        return _cpp_ops()
    except BuildError as error:
        log.warning("the C++ kernels are off, the slower torch reference runs instead: %s", error)
        return _reference_ops()


@cache
def _best_gpu_ops() -> Ops:
    try:
        return _triton_ops()
    except TritonMissing as error:
        log.warning("the Triton kernels are off, the slower torch reference runs instead: %s", error)
        return _reference_ops()
