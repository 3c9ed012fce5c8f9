"""Checks the device-side decisions: each validates shapes and dtypes, then calls its backend.

The checks raise ValueError (shapes, sizes) and TypeError (dtypes) and never read a tensor's
content, so no call waits for the device. Records and shapes: `echo_kernels.device_interface`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from echo_kernels import device_reference
from echo_kernels.checks import need, need_dtype, need_float, need_matrix
from echo_kernels.device_interface import MAX_FAN, Candidates, DeviceImplementation, DrawKeys, Level, TreeRows, Walk
from echo_kernels.dispatch import backend

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class DeviceOps:
    """The decisions of one backend. Build it with `device_ops_for`. All tensors of a call lie on one device."""

    def __init__(self, implementation: DeviceImplementation, name: str) -> None:
        self.name = name
        """``triton`` or ``reference``."""
        self._impl = implementation

    def verify_tree(self, logits: Tensor, rows: TreeRows, keys: DrawKeys, max_depth: int) -> Walk:
        """Draws the token that belongs after each row and walks every tree from its root.

        logits [N, V], row i belonging to `rows` row i (the padding rows' content is never used); tokens
        that top-k or top-p filtering drops must be at -inf in it. While a child of the row reached
        is the token drawn there, it is accepted; else that token is the bonus. The token is
        argmax(logits / T + Gumbel(seed, position + depth)), the plain argmax where T is 0, ties to the
        lower token. A row whose maximum is NaN or infinite fails its request, which keeps the tokens
        before it. A walk accepts at most `max_depth` nodes (D); stopping there costs tokens, not exactness.
        """
        need_float("logits", logits, DTYPES)
        need_matrix("logits", logits)
        n, batch = rows.tokens.shape[0], rows.starts.shape[0] - 1
        if logits.shape[0] != n or not logits.shape[1]:
            need(False, f"logits has shape {tuple(logits.shape)}; expected [{n}, V] as there are {n} tree rows")
        for name, tensor, dtype, size in (
            ("rows.tokens", rows.tokens, torch.int64, n),
            ("rows.parents", rows.parents, torch.int32, n),
            ("rows.depths", rows.depths, torch.int32, n),
            ("rows.owner", rows.owner, torch.int32, n),
            ("rows.starts", rows.starts, torch.int32, batch + 1),
            ("keys.temperatures", keys.temperatures, torch.float32, batch),
            ("keys.seeds", keys.seeds, torch.int64, batch),
            ("keys.positions", keys.positions, torch.int64, batch),
        ):
            _need_vector(name, tensor, dtype, size)
        need(max_depth >= 0, f"max_depth is {max_depth}; give 0 or more")
        return self._impl.verify_tree(logits, rows, keys, max_depth)

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
    ) -> Level:
        """Children of the expanded nodes, the likeliest of them, and which requests may go on.

        logits [B * F, V], row b * F + f being the drafter's at expanded node f of request b;
        front_scores [B, F] float32 and front_nodes [B, F] int64 are those nodes' scores and indices
        (0 and -1 for the root); alive [B] bool; vocabulary [V] int64 maps a column to its token (None:
        itself). Each node gets its `fan` likeliest children, scored front score + min(log-softmax, 0); ties go to
        the lower column. Of a request's F * fan candidates the `width` likeliest are expanded next,
        ties to the lower place. A request passes if its best path's probability reaches
        thresholds [B] float32 (0 passes everybody). A row with a NaN or no finite maximum proposes
        nothing, and so does a request that is not alive.
        """
        need_float("logits", logits, DTYPES)
        need_matrix("logits", logits)
        need_matrix("front_scores", front_scores)
        need_matrix("front_nodes", front_nodes)
        need_dtype("front_scores", front_scores, torch.float32)
        need_dtype("front_nodes", front_nodes, torch.int64)
        batch, front = front_scores.shape
        rows, vocab = logits.shape
        if front_nodes.shape != front_scores.shape or rows != batch * front or not front:
            need(
                False,
                f"logits {tuple(logits.shape)}, front_scores {tuple(front_scores.shape)}, front_nodes "
                f"{tuple(front_nodes.shape)}: expected [B * F, V], [B, F], [B, F] with F > 0",
            )
        _need_vector("alive", alive, torch.bool, batch)
        _need_vector("thresholds", thresholds, torch.float32, batch)
        if vocabulary is not None:
            _need_vector("vocabulary", vocabulary, torch.int64, vocab)
        if not 1 <= fan <= min(vocab, MAX_FAN) or not 1 <= width <= front * fan:
            need(
                False,
                f"fan is {fan} and width {width}; give 1 to {min(vocab, MAX_FAN)} children a node and a width "
                f"of 1 to F * fan = {front * fan}",
            )
        return self._impl.gate_topk(logits, front_scores, front_nodes, alive, thresholds, vocabulary, fan, width)

    def pack_top(
        self, candidates: Candidates, roots: Tensor, budget: Tensor, capacity: int, limit: int, levels: int
    ) -> TreeRows:
        """Picks the likeliest nodes of the whole batch and lays them out as `TreeRows`.

        budget [1] int32 nodes at most (never more than `capacity`, which fixes the output's size) and
        at most `limit` of one request; ties go to the lower node, then to the lower request, so a
        pick is closed under ancestors. Nodes that are NaN or -inf, or lie below such a node, are
        never picked. roots [B] int64 are the roots' tokens; `levels` is the tree's depth in levels.
        """
        _need_vector("budget", budget, torch.int32, 1)
        need_dtype("candidates.scores", candidates.scores, torch.float32)
        _need_forest(candidates, roots, capacity, limit, levels)
        return self._impl.pack_top(candidates, roots, budget, capacity, limit, levels)

    def pack_mask(
        self, candidates: Candidates, roots: Tensor, picked: Tensor, capacity: int, limit: int, levels: int
    ) -> TreeRows:
        """Lays out the nodes picked [B, M] bool (closed under ancestors); arguments as `pack_top`'s.

        Of more than `limit` nodes of a request the first ones are kept, and rows beyond the capacity
        are dropped from the end, which leaves the rest closed under ancestors.
        """
        need_dtype("picked", picked, torch.bool)
        need_matrix("picked", picked)
        _need_forest(candidates, roots, capacity, limit, levels)
        if picked.shape != candidates.tokens.shape:
            need(False, f"picked has shape {tuple(picked.shape)}; expected {tuple(candidates.tokens.shape)}")
        return self._impl.pack_mask(candidates, roots, picked, capacity, limit, levels)


def device_ops_for(device: torch.device | str) -> DeviceOps:
    """The decisions for a device: Triton where `echo_kernels.backend` chooses it, else the reference."""
    return _triton_ops() if backend(device) == "triton" else _reference_ops()


@cache
def _triton_ops() -> DeviceOps:
    from echo_kernels.triton import device  # needs triton

    return DeviceOps(device.IMPLEMENTATION, "triton")


@cache
def _reference_ops() -> DeviceOps:
    return DeviceOps(device_reference, "reference")


def _need_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    need_dtype(name, tensor, dtype)
    if tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a contiguous [{size}]")


def _need_forest(candidates: Candidates, roots: Tensor, capacity: int, limit: int, levels: int) -> None:
    for name in ("tokens", "parents", "scores"):
        tensor = getattr(candidates, name)
        need_matrix(f"candidates.{name}", tensor)
        if tensor.shape != candidates.tokens.shape:
            need(False, f"candidates.{name} is {tuple(tensor.shape)}, tokens is {tuple(candidates.tokens.shape)}")
    need_dtype("candidates.tokens", candidates.tokens, torch.int64)
    need_dtype("candidates.parents", candidates.parents, torch.int64)
    batch, width = candidates.tokens.shape
    _need_vector("candidates.depths", candidates.depths, torch.int64, width)
    _need_vector("roots", roots, torch.int64, batch)
    if capacity < 0 or limit < 0 or levels < 0 or not width:
        need(False, f"capacity {capacity}, limit {limit}, levels {levels}, M {width}: give counts, M at least 1")
