"""A weight matrix, laid out once for its device's products.

Reading the weights is what a pass of few rows spends its time on, and the layout decides how fast they
stream. On a CPU in bf16 that is the kernels' panels, else oneDNN's blocks, whichever suits the processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from echo_kernels import ops_for

PACK_ROWS = 16
"""Rows of activations that oneDNN is asked to lay the weights out for."""


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Linear:
    """``x @ weight.T + bias`` for x [N, in]; weight [out, in], bias [out]. Keeps one copy of the weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._product = _lay_out(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out] in the weight's dtype."""
        return self._product(x, self._weight, self._bias)


def _lay_out(weight: torch.Tensor) -> tuple[torch.Tensor, Product]:
    """The weight as its product wants it."""
    ops = ops_for(weight.device)
    panels = ops.pack_weight(weight)
    if panels is not None:
        return panels, ops.linear
    if _blocks(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS), _blocked_product
    return weight, F.linear


def _blocked_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _blocks(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
