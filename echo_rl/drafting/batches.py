"""Packs conversations into training batches, and gives the labels of every unrolled step.

Row i of a conversation stands for the drafter call whose newest true feature is at position i: step s of the
unroll predicts token i + 2 + s. Only answer positions are rows; the prompt still gives attention keys.
Linear layers run on the packed tokens and rows (no padding); only attention uses the padded layout.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_rl.drafting.features import FeatureShard

MASKED = -1e4  # finite: a padded query row must not turn into NaN


@dataclass(frozen=True)
class Batch:
    """B conversations: N packed tokens, R rows, padded to T keys and A queries."""

    taps: Tensor  # [N, taps * hidden] bfloat16
    final: Tensor  # [N, hidden] bfloat16
    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64 position within the conversation
    token_slots: Tensor  # [N] place in the flattened [B, T] layout
    rows: Tensor  # [R] packed index of each row
    row_slots: Tensor  # [R] place in the flattened [B, A] layout
    last: Tensor  # [R] packed index of the last token of the row's conversation
    bias: Tensor  # [B, A, T] 0 where the row may see the true-feature key, MASKED elsewhere

    def labels(self, step: int, to_draft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The labels of step `step`: ([R] packed index of the label, [R] draft id or -1, [R] bool label exists)."""
        index = self.rows + 2 + step
        exists = index <= self.last
        index = index.clamp_max(len(self.tokens) - 1)
        return index, to_draft[self.tokens[index]], exists


@dataclass(frozen=True)
class Document:
    """One conversation of a shard."""

    shard: int
    index: int
    length: int
    start: int

    @property
    def first_row(self) -> int:
        """The last prompt position: its feature and the first answer token predict the second one."""
        return self.start - 1

    @property
    def rows(self) -> int:
        return self.length - 2 - self.first_row


def documents(shards: Sequence[FeatureShard], min_rows: int = 4) -> list[Document]:
    """Every conversation with at least `min_rows` rows to learn from."""
    found = []
    for number, shard in enumerate(shards):
        talk = shard.conversations
        for index in range(len(talk)):
            document = Document(number, index, int(talk.lengths[index]), int(talk.starts[index]))
            if document.start > 0 and document.rows >= min_rows:
                found.append(document)
    return found


def plan_epoch(
    found: Sequence[Document], tokens: int, rng: random.Random, window: int = 512
) -> Iterator[list[Document]]:
    """Batches of about `tokens` tokens and similar lengths, in random order; each document once."""
    shuffled = rng.sample(found, len(found))
    batches: list[list[Document]] = []
    for begin in range(0, len(shuffled), window):
        batch: list[Document] = []
        for document in sorted(shuffled[begin : begin + window], key=lambda item: item.length):
            if batch and sum(item.length for item in batch) + document.length > tokens:
                batches.append(batch)
                batch = []
            batch.append(document)
        batches.append(batch)
    rng.shuffle(batches)
    yield from batches


def collate(shards: Sequence[FeatureShard], chosen: Sequence[Document]) -> Batch:
    """Read the documents' features and lay them out."""
    width, depth = max(item.length for item in chosen), max(item.rows for item in chosen)
    taps, final, tokens, positions, slots, rows, row_slots, last = ([] for _ in range(8))
    bias = torch.full((len(chosen), depth, width), MASKED, dtype=torch.bfloat16)
    base = 0
    for number, item in enumerate(chosen):
        shard = shards[item.shard]
        tap, end = shard.rows(item.index)
        own = torch.arange(item.first_row, item.length - 2)
        taps.append(tap)
        final.append(end)
        tokens.append(torch.from_numpy(shard.conversations[item.index]))
        positions.append(torch.arange(item.length))
        slots.append(number * width + torch.arange(item.length))
        rows.append(base + own)
        row_slots.append(number * depth + torch.arange(item.rows))
        last.append(torch.full((item.rows,), base + item.length - 1))
        bias[number, : item.rows].masked_fill_(torch.arange(width) <= own[:, None], 0.0)
        base += item.length
    return Batch(
        taps=torch.cat(taps),
        final=torch.cat(final),
        tokens=torch.cat(tokens),
        positions=torch.cat(positions),
        token_slots=torch.cat(slots),
        rows=torch.cat(rows),
        row_slots=torch.cat(row_slots),
        last=torch.cat(last),
        bias=bias,
    )
