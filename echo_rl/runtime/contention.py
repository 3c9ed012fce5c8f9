"""Tells whether other processes keep the threads that serve from their processors.

Linux counts for each thread how long it was ready to run and had to wait (``/proc/PID/task/TID/schedstat``, the second
number, nanoseconds). On a machine of one's own that is next to nothing; beside one busy process it is a good part of
the time. Where the system doesn't tell, nothing counts as contention.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import torch

from echo_kernels.threads import pool

BEGINS, ENDS = 0.10, 0.05
"""Share of the time spent waiting for a processor from which contention begins, and below which it ends."""
MEMORY = 0.25
"""Seconds over which that share is averaged."""


class Contention:
    """Follows one engine's threads. `delays` gives their seconds of waiting so far, `clock` the time in seconds."""

    def __init__(self, delays: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._delays, self._clock = delays, clock
        self._then, self._before = clock(), delays()
        self._share = 0.0
        self._found = False

    def __call__(self) -> bool:
        """Whether there is contention now, judged by the time since the last call as well as by what came before."""
        now, delayed = self._clock(), self._delays()
        passed = now - self._then
        if passed > 0.0:
            share = (delayed - self._before) / passed
            self._share += (share - self._share) * -math.expm1(-passed / MEMORY)
            self._then, self._before = now, delayed
        self._found = self._share > (ENDS if self._found else BEGINS)
        return self._found


class RunDelays:
    """Seconds for which threads were ready to run and had to wait: of those that called this, and of the kernels'."""

    def __init__(self, device: torch.device) -> None:
        self._pool = pool(device)
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close, self._files)

    def __call__(self) -> float:
        self._follow((threading.get_native_id(), *(self._pool.pool_threads() if self._pool else ())))
        return sum(map(_delay, self._files.values())) * 1e-9

    def _follow(self, threads: Iterable[int]) -> None:
        for number in threads:
            if number not in self._files:
                try:
                    self._files[number] = os.open(f"/proc/self/task/{number}/schedstat", os.O_RDONLY)
                except OSError:
                    return


def _close(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)


def _delay(file: int) -> int:
    """Nanoseconds; 0 for a thread that is gone."""
    try:
        return int(os.pread(file, 64, 0).split()[1])
    except (OSError, IndexError, ValueError):
        return 0
