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
"""Environment variable that forces a backend: ``reference`` or ``cpp``."""
CHOICES = ("cpp", "reference")
REFERENCE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
CPP_DTYPES = frozenset({torch.float32, torch.bfloat16})
log = logging.getLogger(__name__)


def backend(device: torch.device | str) -> str:
    """``cpp`` or ``reference``: what `ops_for` uses on this device.

    Raises ValueError where ECHO_KERNELS names no backend or one that cannot run on the device, and
    `BuildError` where it demands ``cpp`` and the extension does not build. Left unset, a failed build
    falls back to ``reference`` with one logged warning.
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
    if forced == "cpp":
        return _cpp_ops()
    if forced == "reference" or kind != "cpu":
        return _reference_ops()
    return _best_cpu_ops()


@cache
def _reference_ops() -> Ops:
    return Ops(reference, "reference", REFERENCE_DTYPES)


@cache
def _cpp_ops() -> Ops:
    return Ops(load_extension(), "cpp", CPP_DTYPES)


@cache
def _best_cpu_ops() -> Ops:
    try:
        return _cpp_ops()
    except BuildError as error:
        log.warning("the C++ kernels are off, the slower torch reference runs instead: %s", error)
        return _reference_ops()
