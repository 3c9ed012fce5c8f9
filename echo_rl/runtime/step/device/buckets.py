"""Rounds steps to a few sizes, so that a few graphs serve every load. Knows nothing of tensors."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from echo_rl.runtime.step.device.rule import DevicePlan


@dataclass(frozen=True)
class Bucket:
    """The sizes of one step: what a graph was captured for. N = nodes + requests tree rows."""

    requests: int
    """Decoding requests, padding included (B)."""
    nodes: int
    """Capacity in drafted nodes (C); 0 in a plain step."""
    depth: int
    """Levels of the trees, as planned (D); 0 in a plain step."""
    width: int
    """Nodes expanded a level, as planned; 0 in a plain step."""
    filtered: bool
    """True where some request filters by top-k or top-p."""

    @property
    def rows(self) -> int:
        return self.nodes + self.requests

    @property
    def draft_key(self) -> tuple[object, ...]:
        """The key of the draft's graph: all that it depends on."""
        return "draft", self.requests, self.nodes, self.depth, self.width

    @property
    def verify_key(self) -> tuple[object, ...]:
        """The key of the verification's graph: all that it depends on."""
        return "verify", self.requests, self.nodes, self.depth, self.filtered


def ladder(first: int, most: int, steps: int) -> tuple[int, ...]:
    """Sizes from `first` to `most`, about `steps` to a doubling: a need is padded by at most 1 / steps of it."""
    sizes, size = [], first
    while size < most:
        sizes.append(size)
        size += max(1, (1 << (size.bit_length() - 1)) // steps)
    return (*sizes, most)


class Buckets:
    """The ladders of one engine. Depth and width are taken as planned: padding them would cost whole passes."""

    def __init__(self, max_batch: int, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self.requests = ladder(1, max_batch, 2)
        self.nodes = ladder(8, max(8, max_batch * max_nodes), 4)

    def of(self, decodes: int, drafting: int, plan: DevicePlan, filtered: bool) -> Bucket:
        """The bucket for `decodes` requests of which `drafting` may speculate. Steps of prompts alone have one padding
        request."""
        requests = self.requests[bisect_left(self.requests, decodes)]
        if not plan.budget:
            return Bucket(requests, 0, 0, 0, filtered)
        most = min(self._max_nodes, plan.width + (plan.depth - 1) * plan.width**2)
        nodes = self.nodes[bisect_left(self.nodes, min(plan.budget, drafting * most))]
        return Bucket(requests, nodes, plan.depth, plan.width, filtered)
