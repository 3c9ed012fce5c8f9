"""Packs what a step leaves on the device into one int32 vector, and reads that vector as the host's records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echo_kernels.device_interface import TreeRows, Walk
from echo_rl.contracts import Selection, Verdict
from echo_rl.runtime.step.base import DraftStats, StepResult
from echo_rl.runtime.step.device.buckets import Bucket
from echo_rl.runtime.step.device.drafter import DeviceDraftStats


def joined(*parts: Tensor) -> Tensor:
    """Tensors of any shape as one int32 vector; the bits of float32 are kept."""
    return torch.cat([p.reshape(-1).view(torch.int32) if p.is_floating_point() else p.reshape(-1).int() for p in parts])


def pack_draft(stats: DeviceDraftStats) -> Tensor:
    """[1 + D + 2 B] int32: the drafter's numbers one after the other."""
    return joined(stats.drafted, stats.drafting, stats.levels, stats.confidence)


def draft_size(bucket: Bucket) -> int:
    return 1 + bucket.depth + 2 * bucket.requests if bucket.nodes else 0


def pack_step(rows: TreeRows, walk: Walk, first: Walk | None, draft: Tensor) -> Tensor:
    """Everything that the host must know, trees first; `draft` is `pack_draft`'s."""
    prompts = (first.tokens, first.failed) if first is not None else ()
    return joined(
        walk.tokens, walk.accepted, walk.lengths, walk.failed, rows.starts, rows.parents, rows.depths, rows.tokens,
        draft, *prompts,
    )  # fmt: skip


def step_size(bucket: Bucket, prompts: int) -> int:
    """The length of `pack_step`'s vector with so many prompts that end."""
    b, d = bucket.requests, bucket.depth
    return b * (2 * d + 3) + b + 1 + 3 * bucket.rows + draft_size(bucket) + 2 * prompts


@dataclass(frozen=True)
class Sizes:
    """The part of a bucket that is real requests."""

    decodes: int
    drafting: int
    prompts: int
    """Prompts that end."""


class _Cursor:
    """Takes pieces off a vector."""

    def __init__(self, vector: np.ndarray) -> None:
        self._vector, self._at = vector, 0

    def take(self, *shape: int) -> np.ndarray:
        begin = self._at
        self._at += int(np.prod(shape))
        return self._vector[begin : self._at].reshape(shape)


def unpack_step(vector: np.ndarray, bucket: Bucket, sizes: Sizes) -> StepResult:
    """The landed vector as records that own their data."""
    b, d, cursor = bucket.requests, bucket.depth, _Cursor(vector)
    tokens, accepted, lengths, failed = cursor.take(b, d + 1), cursor.take(b, d), cursor.take(b), cursor.take(b)
    starts, parents, depths, nodes = cursor.take(b + 1), *(cursor.take(bucket.rows) for _ in range(3))
    draft = _draft(cursor, bucket, sizes) if bucket.nodes else None
    first, first_failed = cursor.take(sizes.prompts), cursor.take(sizes.prompts)
    real = range(sizes.decodes)
    wrong = [i for i in real if failed[i]] + [sizes.decodes + i for i in range(sizes.prompts) if first_failed[i]]
    verdict = Verdict(
        accepted=tuple(tuple(accepted[i, : lengths[i]].tolist()) for i in real) + ((),) * sizes.prompts,
        tokens=tuple(_drawn(tokens[i]) for i in real) + tuple(_drawn(token) for token in first.reshape(-1, 1)),
        failed=frozenset(wrong),
    )
    return StepResult(verdict, _selection(starts[: sizes.decodes + 1], parents, depths, nodes), draft)


def _drawn(row: np.ndarray) -> tuple[int, ...]:
    return tuple(row[row >= 0].tolist())


def _selection(starts: np.ndarray, parents: np.ndarray, depths: np.ndarray, tokens: np.ndarray) -> Selection:
    """The nodes behind each root, in row order."""
    counts = np.diff(starts) - 1
    root = np.repeat(starts[:-1], counts)
    row = root + 1 + np.arange(len(root)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = (counts, tokens[row], parents[row] - root - 1, depths[row] - 1)
    return Selection(*(torch.from_numpy(c.astype(np.int64)) for c in columns))


def _draft(cursor: _Cursor, bucket: Bucket, sizes: Sizes) -> DraftStats:
    drafted, drafting = int(cursor.take(1)[0]), cursor.take(bucket.depth).tolist()
    levels, confidence = cursor.take(bucket.requests), cursor.take(bucket.requests).view(np.float32)
    return DraftStats(
        drafted=drafted,
        drafting=tuple(count for count in drafting if count),
        confidence=tuple(confidence[: sizes.drafting].tolist()),
        levels=tuple(levels[: sizes.drafting].tolist()),
    )
