"""Runs a body of fixed sizes, from its second use on as a captured graph where the device has graphs.

A graph replays what was captured at the addresses it was captured with: a body may read nothing but
buffers that stay, and must take every size from its key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from echo_kernels import backend

MAX_GRAPHS = 64
"""Graphs kept at once; the one unused for longest makes room."""

Body = Callable[[], Tensor]


class Replayable(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Body], tuple[Replayable, Tensor]]
"""Records a body without running it; returns the graph and the tensor that every replay writes."""


@dataclass
class GraphCounts:
    """Counts of the ways in which bodies were run."""

    plain: int = 0
    """Bodies called as they are: the first of each key, and everything where the device has no graphs."""
    captured: int = 0
    replayed: int = 0
    dropped: int = 0
    """Keys that made room for others."""


class Graphs:
    """The captured bodies by key. `capture` None: bodies are always called as they are."""

    def __init__(self, capture: Capture | None, most: int = MAX_GRAPHS) -> None:
        self._capture = capture
        self._most = most
        self._held: OrderedDict[Hashable, tuple[Replayable, Tensor] | None] = OrderedDict()  # None: ran once
        self.counts = GraphCounts()

    def __len__(self) -> int:
        return len(self._held)

    def run(self, key: Hashable, body: Body) -> Tensor:
        """The body's result; a replay overwrites that of the replay before."""
        if self._capture is None:
            return self.plain(body)
        if key not in self._held:  # the first run also compiles kernels, which a capture can't
            self._hold(key, None)
            return self.plain(body)
        held = self._held[key]
        if held is None:
            held = self._capture(body)
            self.counts.captured += 1
        self._hold(key, held)
        graph, result = held
        graph.replay()
        self.counts.replayed += 1
        return result

    def plain(self, body: Body) -> Tensor:
        """Call a body whose sizes are not worth a graph."""
        self.counts.plain += 1
        return body()

    def _hold(self, key: Hashable, held: tuple[Replayable, Tensor] | None) -> None:
        self._held[key] = held
        self._held.move_to_end(key)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
            self.counts.dropped += 1


class CudaCapture:
    """`Capture` by CUDA graphs that share one memory pool: a result must be read before another graph runs."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> tuple[Replayable, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = body()
        return graph, result


def capture_for(device: torch.device) -> Capture | None:
    """The function that captures on this device, None where nothing does: the reference kernels read results back as
    they go."""
    return CudaCapture() if device.type == "cuda" and backend(device) == "triton" else None
