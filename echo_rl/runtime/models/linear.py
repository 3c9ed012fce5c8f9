"""Lays a weight matrix out once for its device's products.

Reading the weights is what a pass of few rows spends its time on, and the layout decides how fast they
stream. On a CPU that is the kernels' panels, or oneDNN's blocks for bf16 on processors with AMX; half as
many bytes where the caller can bear weights of eight bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from echo_kernels import ops_for

PACK_ROWS = 16
"""Rows of activations that oneDNN is asked to lay the weights out for."""

Operands = tuple[torch.Tensor, torch.Tensor | None]
"""The weight in its product's layout, and its second operand: scales of eight bits, else the bias."""
Product = Callable[..., torch.Tensor]
"""The function of x [N, in] and the operands that gives the product."""


class Linear:
    """``x @ weight.T + bias`` for x [N, in]; weight [out, in], bias [out]. Keeps one copy of the weight.

    With `int8`, weights and activations are rounded to eight bits where the device has a product for that
    (`Ops.linear_int8`): for a drafter, whose errors verification mends, not for a target. It takes no bias.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False) -> None:
        self.in_features = weight.shape[1]
        self._dtype = weight.dtype
        self._product, self._operands = _lay_out(weight, bias, int8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out] in the weight's dtype. Raises ValueError on another width, dtype or layout."""
        if x.shape[1:] != (self.in_features,) or x.dtype is not self._dtype or not x.is_contiguous():
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}; give contiguous rows of {self.in_features} numbers, {self._dtype}"
            )
        return self._product(x, *self._operands)


def _lay_out(weight: torch.Tensor, bias: torch.Tensor | None, int8: bool) -> tuple[Product, Operands]:
    ops = ops_for(weight.device)
    narrow = ops.pack_int8(weight) if int8 and bias is None else None
    if narrow is not None:
        return ops.trusted.linear_int8, narrow  # what is laid out here is sound, and `Linear` sees to the rows
    panels = ops.pack_weight(weight)
    if panels is not None:
        return ops.trusted.linear, (panels, bias)
    if _blocks(weight):
        return _blocked, (torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS), bias)
    return F.linear, (weight, bias)


def _blocked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _blocks(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
