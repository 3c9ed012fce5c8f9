"""Sends what the host knows before a step to the device ahead of it, into buffers that never move.

The host's part of a step ends here: sequences and plans become numbers; what comes after reads tensors.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echo_kernels.device_interface import DrawKeys
from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams
from echo_rl.runtime.layout import Pages
from echo_rl.runtime.scheduler import Batch, Chunk
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.step.device.buckets import Bucket
from echo_rl.runtime.step.device.buffers import Mirror
from echo_rl.runtime.step.device.rule import DevicePlan

NEVER = float("inf")
"""A top-p that no sum of probabilities reaches."""


@dataclass(frozen=True)
class Drawing:
    """The parameters by which requests draw their next token. R requests."""

    keys: DrawKeys
    top_k: Tensor  # [R] int64, the vocabulary's size and more: all
    top_p: Tensor  # [R] float32, `NEVER`: all


@dataclass(frozen=True)
class Given:
    """A bucket's view of the sent buffers: addresses depend on the bucket alone. B requests, decodes first."""

    pages: Pages  # [B]
    all_tables: Tensor  # [2 max_batch + 1, blocks]: B requests, one without rows, then those with prompt rows
    roots: Tensor  # [B] int64 the token to process, 0 in padding
    drafting: Tensor  # [B] bool
    drawing: Drawing  # [B]
    thresholds: Tensor  # [D] float32
    powers: Tensor  # [D] float32
    log_floor: Tensor  # [1] float32
    budget: Tensor  # [1] int32


@dataclass(frozen=True)
class Pairs:
    """Committed pairs that the drafter hasn't seen, the last of each request excepted. n rows."""

    tokens: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    slots: Tensor  # [n] int64


@dataclass(frozen=True)
class Prompts:
    """The prompt rows of a step. T rows of P requests, of which Q draw their first token."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    local: Tensor  # [T] int64 place within the chunk
    counts: Tensor  # [P] int64
    context: Tensor  # [P] int64 committed before the chunk
    ends: Tensor  # [Q] int64 last rows of the prompts that end, counted from the first prompt row
    drawing: Drawing  # [Q]
    longest: int
    """Rows of the longest chunk."""


class Inputs:
    """The buffers of one engine and the code that fills them."""

    def __init__(self, config: EngineConfig, spare: int, device: torch.device) -> None:
        self._size, self._block_size, self._spare = config.max_batch_size, config.block_size, spare
        self._levels = config.max_expanded + 1
        blocks = -(-(config.max_context + config.headroom) // config.block_size)
        prompts = min(config.prefill_chunk, self._size)
        self._tables = Mirror((2 * self._size + 1, blocks), torch.int32, device)
        self._whole = Mirror((5, self._size), torch.int64, device)  # lengths, roots, drafting, seeds, top-k
        self._real = Mirror((2, self._size), torch.float32, device)  # temperatures, top-p
        self._plan = Mirror((2 * self._levels + 1,), torch.float32, device)  # thresholds, powers, floor
        self._budget = Mirror((1,), torch.int32, device)
        self._pairs = Mirror((3 * spare,), torch.int64, device)
        self._chunks = Mirror((4 * config.prefill_chunk + 6 * prompts,), torch.int64, device)
        self._draws = Mirror((2 * prompts,), torch.float32, device)

    def given(self, bucket: Bucket) -> Given:
        """The bucket's views; what they hold is of the last `send_batch`."""
        b, d = bucket.requests, bucket.depth
        lengths, roots, drafting, seeds, top_k = (row[:b] for row in self._whole.device)
        temperatures, top_p = (row[:b] for row in self._real.device)
        thresholds, powers = self._plan.device[:d], self._plan.device[self._levels : self._levels + d]
        return Given(
            Pages(self._tables.device[:b], lengths, self._block_size), self._tables.device, roots, drafting > 0,
            Drawing(DrawKeys(temperatures, seeds, lengths + 1), top_k, top_p), thresholds, powers,
            self._plan.device[-1:], self._budget.device,
        )  # fmt: skip

    def send_batch(self, batch: Batch, plan: DevicePlan, bucket: Bucket) -> None:
        whole, real, levels = self._whole.host, self._real.host, self._levels
        whole[:], real[0], real[1] = 0, 0.0, NEVER
        for i, sequence in enumerate(batch.decodes):
            params = sequence.request.params
            whole[:, i] = sequence.kv_len, sequence.tokens[-1], i < len(batch.drafting), params.seed, _top_k(params)
            real[:, i] = params.drawn_at, _top_p(params)
            self._write_table(i, sequence)
        for i, chunk in enumerate(batch.chunks):
            self._write_table(bucket.requests + 1 + i, chunk.sequence)
        self._plan.host[: plan.depth] = plan.thresholds
        self._plan.host[levels : levels + plan.depth] = plan.powers
        self._plan.host[-1] = plan.log_floor
        self._budget.host[0] = plan.budget
        self._tables.send(bucket.requests + 1 + len(batch.chunks))
        for mirror in (self._whole, self._real, self._plan, self._budget):
            mirror.send()

    def send_pairs(self, sequences: Seq[Sequence]) -> Pairs:
        """The pairs that the drafter must catch up with before it drafts for these requests."""
        spans = [(s, s.draft_len, s.kv_len - 1) for s in sequences if s.draft_len < s.kv_len - 1]
        tokens = [t for s, begin, end in spans for t in s.tokens[begin + 1 : end + 1]]
        places = [(s, np.arange(begin, end)) for s, begin, end in spans]
        parts = self._send(self._pairs, [tokens, _joined([p for _, p in places]), self._slots(places)])
        return Pairs(*parts)

    def send_prompts(self, chunks: Seq[Chunk]) -> Prompts | None:
        if not chunks:
            return None
        tokens = [t for c in chunks for t in c.sequence.tokens[c.sequence.kv_len : c.sequence.kv_len + c.count]]
        local = [np.arange(c.count) for c in chunks]
        places = [(c.sequence, c.sequence.kv_len + part) for c, part in zip(chunks, local, strict=True)]
        counts = [c.count for c in chunks]
        ends = np.cumsum(counts) - 1
        last = [i for i, c in enumerate(chunks) if c.last]
        drawn = [chunks[i].sequence for i in last]
        params = [s.request.params for s in drawn]
        parts = self._send(
            self._chunks,
            [tokens, _joined([p for _, p in places]), self._slots(places), _joined(local), counts,
             [c.sequence.kv_len for c in chunks], ends[last], [p.seed for p in params],
             [s.next_position for s in drawn], [_top_k(p) for p in params]],
        )  # fmt: skip
        temperatures, top_p = self._send(self._draws, [[p.drawn_at for p in params], [_top_p(p) for p in params]])
        tokens_, rotary, slots, within, sizes, context, last_rows, seeds, keys, top_k = parts
        drawing = Drawing(DrawKeys(temperatures, seeds, keys), top_k, top_p)
        return Prompts(tokens_, rotary, slots, within, sizes, context, last_rows, drawing, max(counts))

    def _write_table(self, row: int, sequence: Sequence) -> None:
        self._tables.host[row, : len(sequence.blocks)] = sequence.blocks

    def _slots(self, places: Seq[tuple[Sequence, np.ndarray]]) -> np.ndarray:
        """The cache rows of logical positions, request by request."""
        size = self._block_size
        return _joined([np.asarray(s.blocks)[p // size] * size + p % size for s, p in places])

    def _send(self, mirror: Mirror, columns: Seq[Seq[float] | np.ndarray]) -> list[Tensor]:
        """Send columns of any lengths one after the other; their device views."""
        ends = np.cumsum([len(column) for column in columns])
        views = []
        for column, end in zip(columns, ends.tolist(), strict=True):
            mirror.host[end - len(column) : end] = column
            views.append(mirror.device[end - len(column) : end])
        mirror.send(int(ends[-1]))
        return views


def filters(params: SamplingParams) -> bool:
    """True where top-k or top-p can change what is drawn: the plain argmax passes every filter."""
    return params.drawn_at > 0 and (params.top_k > 0 or params.top_p < 1.0)


def _top_k(params: SamplingParams) -> int:
    return params.top_k if filters(params) and params.top_k else np.iinfo(np.int64).max


def _top_p(params: SamplingParams) -> float:
    return params.top_p if filters(params) and params.top_p < 1.0 else NEVER


def _joined(parts: Seq[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
