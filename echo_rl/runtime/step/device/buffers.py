"""Moves data between host and device: pinned copies sent ahead, one landing a step, and the device's own clock.

Every wait for the device is in `Landing.read`, which counts it.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor


class Mirror:
    """A device tensor that never moves (graphs know its address) and the host array that is copied into it.

    The host may write again once the step that was sent has landed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._twin = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.host: np.ndarray = self._twin.numpy()
        self.device = torch.zeros(shape, dtype=dtype, device=device)

    def send(self, rows: int | None = None) -> None:
        """Start copying the first `rows` rows (None: all), and don't wait."""
        self.device[:rows].copy_(self._twin[:rows], non_blocking=True)


class Landing:
    """Brings a step's results to the host: one copy, one wait."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._twin = torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.waits = 0
        """Number of times that the host waited for the device."""

    def read(self, results: Tensor) -> np.ndarray:
        """results [n] int32 -> the same on the host, valid until the next call."""
        landed = self._twin[: results.shape[0]]
        landed.copy_(results, non_blocking=True)
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
        self.waits += 1
        array: np.ndarray = landed.numpy()
        return array


class Stopwatch:
    """Seconds of device time between two marks, to be read after a landing that follows them."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else ()
        self._marks = [0.0, 0.0]

    def mark(self, which: int) -> None:
        """`which` is 0 for the begin, 1 for the end."""
        if self._events:
            self._events[which].record()
        else:
            self._marks[which] = time.perf_counter()

    def seconds(self) -> float:
        if self._events:
            begin, end = self._events
            return float(begin.elapsed_time(end)) / 1000.0
        return self._marks[1] - self._marks[0]
