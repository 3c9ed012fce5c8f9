"""Random forests for the tests of the device-side decisions, and their backends.

The Triton one runs on the GPU if there is one, else interpreted (see conftest.py); called with tensors
on the CPU either way.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton: pip install 'echo-rl[gpu]'")

from echo_kernels import device_reference
from echo_kernels.device_interface import Candidates
from echo_kernels.device_ops import DeviceOps
from echo_kernels.triton import device


class OnGpu:
    """A backend on the GPU, called with records and tensors on the CPU."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            return moved(getattr(device.IMPLEMENTATION, name)(*(moved(a, "cuda") for a in arguments)), "cpu")

        return call


def moved(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(where)
    if is_dataclass(value):
        return replace(value, **{f.name: moved(getattr(value, f.name), where) for f in fields(value)})
    return value


REFERENCE = DeviceOps(device_reference, "reference")
TRITON = DeviceOps(OnGpu() if torch.cuda.is_available() else device.IMPLEMENTATION, "triton")


def forest(seed: int, batch: int, depth: int, width: int, coarse: bool = False, vocab: int = 50) -> Candidates:
    """A forest as the drafter grows it: `width` expanded nodes a level with `width` children each.

    Tokens of siblings differ. `coarse` scores tie often.
    """
    rng = np.random.default_rng(seed)
    levels = [width] + [width * width] * (depth - 1)
    first = np.cumsum([0, *levels])
    nodes = int(first[-1])
    tokens, parents = np.zeros((batch, nodes), np.int64), np.full((batch, nodes), -1, np.int64)
    steps = -rng.exponential(1.0, (batch, nodes)).astype(np.float32)
    scores = np.round(steps) if coarse else steps
    for b in range(batch):
        tokens[b, :width] = rng.permutation(vocab)[:width]
        for d in range(1, depth):
            above = np.sort(rng.choice(np.arange(first[d - 1], first[d]), width, replace=False))
            here = slice(first[d], first[d + 1])
            parents[b, here] = above.repeat(width)
            tokens[b, here] = np.concatenate([rng.permutation(vocab)[:width] for _ in above])
            scores[b, here] += scores[b, parents[b, here]]
    depths = torch.from_numpy(np.repeat(np.arange(depth), levels))
    return Candidates(torch.from_numpy(tokens), torch.from_numpy(parents), depths, torch.from_numpy(scores))


def with_holes(candidates: Candidates, seed: int) -> Candidates:
    """Some nodes NaN, some -inf. What hangs below them doesn't exist either, whatever its score says."""
    rng = torch.Generator().manual_seed(seed)
    spoilt = torch.rand(candidates.scores.shape, generator=rng)
    scores = candidates.scores.masked_fill(spoilt < 0.06, float("nan")).masked_fill(spoilt > 0.94, float("-inf"))
    return replace(candidates, scores=scores)


def closed(candidates: Candidates) -> Candidates:
    """-inf below every -inf, as the records of the runtime promise (below a NaN they promise nothing)."""
    scores = candidates.scores.clone()
    for node in range(scores.shape[1]):  # parents come first
        parent = candidates.parents[:, node]
        above = scores.gather(1, parent.clamp(min=0)[:, None]).squeeze(1)
        scores[(parent >= 0) & (above == float("-inf")), node] = float("-inf")
    return replace(candidates, scores=scores)


def budget(count: int) -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32)


def same(actual: Any, expected: Any) -> None:
    """Equal records: dtypes, shapes and whole numbers exactly, floats to a few units in the last place."""
    for field in fields(expected):
        a, e = getattr(actual, field.name), getattr(expected, field.name)
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6, msg=lambda text, name=field.name: f"{name}: {text}")
