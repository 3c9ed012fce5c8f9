"""Filters rows by top-k and top-p with settings of their own, without asking how many rows filter."""

from __future__ import annotations

import torch
from torch import Tensor


def dropped_tokens(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[N, V] bool: the tokens that a row's top-k or top-p drops; never its likeliest.

    scaled [N, V] float32 logits over the temperature, top_k [N] int64, top_p [N] float32 (any number
    above every sum of probabilities: no such filter). Equal logits keep the order of their tokens.
    """
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    beyond = rank >= top_k[:, None]
    probability = ordered.masked_fill(beyond, float("-inf")).softmax(dim=1)
    before = probability.cumsum(dim=1) - probability
    dropped = beyond | ((before >= top_p[:, None]) & (rank > 0))
    return torch.zeros_like(dropped).scatter_(1, order, dropped)
