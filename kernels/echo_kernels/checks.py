"""Checks arguments for the operations. Each passes silently or raises; messages are built on failure only."""

from __future__ import annotations

import torch
from torch import Tensor


def need(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def need_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}")


def need_float(name: str, tensor: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """Raises TypeError unless the backend computes in the tensor's dtype."""
    if tensor.dtype not in dtypes:
        known = ", ".join(sorted(str(d) for d in dtypes))
        raise TypeError(
            f"{name} is {tensor.dtype}; this backend takes {known} (ECHO_KERNELS=reference takes any float dtype)"
        )


def need_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a contiguous matrix")


def need_rows(name: str, tensor: Tensor) -> None:
    """Like `need_matrix`, but rows may lie apart (a slice of a wider buffer)."""
    if tensor.dim() != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a matrix with adjacent columns")
