"""Defines the records of the device-side decisions and the protocol that every backend of them follows.

These operations keep a step's decisions on the device: sizes are fixed in advance, what varies
(counts, budgets, thresholds) stays in tensors, so no call waits for the device and a step can be
captured as a graph. `echo_kernels.device_reference` is the specification and
`echo_kernels.device_ops.DeviceOps` documents each operation and checks its arguments.

Shapes: B requests, M candidate nodes a request (padded), C the capacity in nodes, N = C + B rows,
V the vocabulary, F nodes expanded a request, D the deepest walk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MAX_FAN = 64
"""Most children a node that `gate_topk` offers: it takes them one by one."""


@dataclass(frozen=True)
class Candidates:
    """The nodes a drafter proposed, levels in order: parents precede their children and score no less."""

    tokens: Tensor  # [B, M] int64
    parents: Tensor  # [B, M] int64, index into the same row; -1 for a child of the root
    depths: Tensor  # [M] int64, 0 for the root's children
    scores: Tensor  # [B, M] float32 cumulative log-probability; -inf or NaN where the node does not exist


@dataclass(frozen=True)
class TreeRows:
    """The flattened super-tree: a root and its nodes for each request in turn, then padding rows."""

    tokens: Tensor  # [N] int64; 0 in padding
    parents: Tensor  # [N] int32, row of the parent, smaller than the node's own; a root's own row; -1 in padding
    depths: Tensor  # [N] int32, 0 for a root; 0 in padding
    owner: Tensor  # [N] int32, the request; -1 in padding
    mask: Tensor  # [N, 1 + limit] bool: column j is the request's j-th row, true for ancestors and the row itself
    starts: Tensor  # [B + 1] int32: request b has the rows starts[b] to starts[b + 1], its root first

    @property
    def limit(self) -> int:
        """Most nodes that a request can have."""
        return self.mask.shape[1] - 1


@dataclass(frozen=True)
class DrawKeys:
    """The keys of each request's draws: the token at a position is argmax(logits / T + Gumbel(seed, position))."""

    temperatures: Tensor  # [B] float32; 0 is the plain argmax
    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, where the request's next token goes


@dataclass(frozen=True)
class Walk:
    """The decisions of verification; -1 beyond the end of a row."""

    tokens: Tensor  # [B, D + 1] int64: the accepted nodes' tokens, then the bonus token (none if failed)
    accepted: Tensor  # [B, D] int32: accepted nodes as indices among the request's nodes, root first
    lengths: Tensor  # [B] int32 accepted nodes
    failed: Tensor  # [B] bool: the walk met a row without a finite maximum


@dataclass(frozen=True)
class Level:
    """One drafted level of every request and the candidates to expand next."""

    tokens: Tensor  # [B, F * fan] int64; 0 where the score is -inf
    scores: Tensor  # [B, F * fan] float32 cumulative log-probability; -inf where nothing was drafted
    parents: Tensor  # [B, F * fan] int64 node index of the parent; 0 where the score is -inf
    best: Tensor  # [B, width] int64 places in this level, likeliest first; 0 where there is no such candidate
    best_scores: Tensor  # [B, width] float32
    alive: Tensor  # [B] bool: the requests that passed the gate


class DeviceImplementation(Protocol):
    """A backend: a module or an object with these callables. Arguments were checked by the caller."""

    def verify_tree(self, logits: Tensor, rows: TreeRows, keys: DrawKeys, max_depth: int, /) -> Walk: ...

    def gate_topk(
        self,
        logits: Tensor,
        front_scores: Tensor,
        front_nodes: Tensor,
        alive: Tensor,
        thresholds: Tensor,
        vocabulary: Tensor | None,
        fan: int,
        width: int,
        /,
    ) -> Level: ...

    def pack_top(
        self, candidates: Candidates, roots: Tensor, budget: Tensor, capacity: int, limit: int, levels: int, /
    ) -> TreeRows: ...

    def pack_mask(
        self, candidates: Candidates, roots: Tensor, picked: Tensor, capacity: int, limit: int, levels: int, /
    ) -> TreeRows: ...
