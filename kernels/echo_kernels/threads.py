"""Keeps one kind of thread at work: while the kernels' own threads serve a pass, torch's stay asleep.

torch runs its loops on OpenMP's threads, which spin for milliseconds after each of them. Beside the kernels' threads
they would be two for every processor, and beside a busy process each barrier would wait for one that is put aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch

from echo_kernels.dispatch import backend, ops_for


class Pool(Protocol):
    """The part of the C++ backend that runs its threads."""

    multiplies: bool
    """False where large products are left to torch (processors with AMX)."""

    def threads(self) -> int:
        """The threads of the calling thread's kernels; 0 for as many as torch's."""
        ...

    def set_threads(self, threads: int, /) -> None: ...

    def pool_threads(self) -> list[int]:
        """The system's numbers of the threads made so far, callers not among them; 0 where it has none."""
        ...

    def pool_times(self) -> tuple[int, int, int]:
        """Calls that more than one thread was offered, the callers' nanoseconds in them, and of those the ones spent
        waiting for pieces that other threads had begun; since the process began."""
        ...


def pool(device: torch.device | str = "cpu") -> Pool | None:
    """The threads behind a device's kernels; None where it has none (a GPU, the reference)."""
    return cast(Pool, ops_for(device).trusted) if backend(device) == "cpp" else None


@contextmanager
def kernel_threads(device: torch.device | str) -> Iterator[None]:
    """While open, this thread's kernels use as many threads as torch may, and torch's own operations one.

    Changes nothing on a GPU, with the reference backend, where torch multiplies (AMX), and within itself.
    """
    threads = pool(device)
    if threads is None or not threads.multiplies or threads.threads():
        yield
        return
    count = torch.get_num_threads()
    threads.set_threads(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        threads.set_threads(0)
