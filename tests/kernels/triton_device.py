"""The device that Triton kernels run on in tests: on a GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter


class OnDevice:
    """A backend whose tensors lie on a device, called with tensors on the CPU: copies there and back."""

    def __init__(self, implementation: object, device: str) -> None:
        self._implementation = implementation
        self._device = device

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments: object) -> object:
            there = tree_map(self._move, arguments)
            result = getattr(self._implementation, name)(*there)
            home = {id(theirs): mine for mine, theirs in zip(tree_leaves(arguments), tree_leaves(there), strict=True)}
            for theirs in tree_leaves(there):
                if isinstance(theirs, torch.Tensor):
                    home[id(theirs)].copy_(theirs)
            return tree_map(lambda t: home.get(id(t), t.cpu()) if isinstance(t, torch.Tensor) else t, result)

        return call

    def _move(self, argument: object) -> object:
        if isinstance(argument, torch.Tensor):
            return argument.to(self._device, copy=True)
        return torch.device(self._device) if isinstance(argument, torch.device) else argument


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """The interpreter keeps bfloat16 as the bits of an integer, which it multiplies as such in tl.dot
    and truncates to; a GPU multiplies the numbers and rounds to the nearest."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_exactly(self, source, target):
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, source, target)

    def dot_exactly(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, *rest)

    with mock.patch.object(builder, "cast_impl", cast_exactly), mock.patch.object(builder, "create_dot", dot_exactly):
        yield


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32, rounded to the nearest, ties to even."""
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
