"""Where rows live: from sequences and logical positions to cache slots and attention views.

A request's *logical* position p is the p-th cache row it owns. Committed tokens come first; the nodes
of a tree follow in row order, so a node's logical position differs from its rotary position.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from echo_rl.runtime.kv_cache import AttentionView
from echo_rl.runtime.sequence import Sequence


class Layout:
    """The block tables of one step's sequences, on the device. R sequences."""

    def __init__(self, sequences: Seq[Sequence], block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        table = np.zeros((len(sequences), max(len(s.blocks) for s in sequences)), dtype=np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        self.tables = self.tensor(table)  # [R, blocks]
        self.kv_lens = self.tensor(np.array([s.kv_len for s in sequences], dtype=np.int64))  # [R]

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

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
        requests: torch.Tensor | None = None,  # [R'] which sequences; all by default
    ) -> AttentionView:
        start = torch.zeros(len(rows) + 1, dtype=torch.int32, device=self.device)
        start[1:] = rows.cumsum(0)
        tables = self.tables if requests is None else self.tables[requests]
        return AttentionView(
            slots, tables, self.block_size, start, context.int(), (context + extra).int(), mask
        )  # fmt: skip


def spread(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For ragged counts [R]: the owner [N] and the index within its owner [N] of every element."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - start[owner]
