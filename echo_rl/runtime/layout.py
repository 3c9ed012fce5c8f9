"""Maps sequences and logical positions to cache slots and attention views.

A request's *logical* position p is the p-th cache row it owns. Committed tokens come first; the nodes
of a tree follow in row order, so a node's logical position differs from its rotary position.
Where a row goes follows from what the host knows: a `Layout` reckons in NumPy and hands over tensors.
`Pages` reckon on tensors, for callers whose numbers live on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np
import torch

from echo_rl.runtime.kv_cache import AttentionView
from echo_rl.runtime.sequence import Sequence


class Pages:
    """Block tables and lengths on the device. R sequences; those of padding have length 0."""

    def __init__(self, tables: torch.Tensor, kv_lens: torch.Tensor, block_size: int) -> None:
        self.tables, self.kv_lens, self.block_size, self.device = tables, kv_lens, block_size, tables.device

    def slots(self, request: torch.Tensor, logical: torch.Tensor) -> torch.Tensor:
        """[N] cache rows of logical positions [N] of requests [N]."""
        block = self.tables[request, logical // self.block_size].long()
        return block * self.block_size + logical % self.block_size

    def view(
        self,
        slots: torch.Tensor,  # [N]
        rows: torch.Tensor,  # [R'] rows a request
        context: torch.Tensor,  # [R'] logical positions that every row of the request sees
        extra: torch.Tensor,  # [R'] positions after the context, seen through the mask
        mask: torch.Tensor,  # [N, W]
    ) -> AttentionView:
        start = torch.zeros(len(rows) + 1, dtype=torch.int32, device=self.device)
        start[1:] = rows.cumsum(0)
        return AttentionView(
            slots, self.tables, self.block_size, start, context.int(), (context + extra).int(), mask
        )  # fmt: skip


class Layout(Pages):
    """The block tables of one step's sequences, on the host and on the device. R sequences."""

    def __init__(self, sequences: Seq[Sequence], block_size: int, device: torch.device) -> None:
        table = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), dtype=np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        self.host_tables = table  # [R, blocks]
        self.host_kv_lens = np.array([s.kv_len for s in sequences], dtype=np.int64)  # [R]
        super().__init__(_sent(table, device), _sent(self.host_kv_lens, device), block_size)

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """An array on the device. It may share the array's memory."""
        return _sent(values, self.device)

    def host_slot(self, request: int, logical: int) -> int:
        """The cache row of one logical position."""
        block, inside = divmod(logical, self.block_size)
        return int(self.host_tables[request, block]) * self.block_size + inside

    def host_slots(self, request: np.ndarray, logical: np.ndarray) -> np.ndarray:
        """`slots` of arrays of one shape, or shapes that broadcast."""
        block = logical // self.block_size
        found: np.ndarray = (self.host_tables[request, block] - block) * self.block_size + logical
        return found

    def host_view(
        self,
        slots: np.ndarray,  # [N]
        starts: np.ndarray,  # [R' + 1] each request's first row, then N; int32
        context: np.ndarray,  # [R'] logical positions that every row of the request sees
        extra: np.ndarray | list[int] | int,  # [R'] positions after the context, seen through the mask
        mask: torch.Tensor,  # [N, W]
        requests: np.ndarray | None = None,  # [R'] which sequences, rising; the first R' by default
    ) -> AttentionView:
        """`view`, of arrays."""
        first = requests is None or requests[-1] + 1 == len(requests)
        tables = self.tables[: len(context)] if first else self.tensor(self.host_tables[requests])
        ends = (context + extra).astype(np.int32)
        return AttentionView(
            self.tensor(slots), tables, self.block_size, self.tensor(starts), self.tensor(context.astype(np.int32)),
            self.tensor(ends), mask,
        )  # fmt: skip


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.to(device)


def ragged_rows(counts: Seq[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The layout of ragged counts [R]: the owner [N] and the index within its owner [N] of every element, both int64,
    and the place where each owner's elements begin, then N [R + 1] int32."""
    owner = np.array([r for r, count in enumerate(counts) for _ in range(count)], dtype=np.int64)
    local = np.array([place for count in counts for place in range(count)], dtype=np.int64)
    return owner, local, np.array([0, *accumulate(counts)], dtype=np.int32)
