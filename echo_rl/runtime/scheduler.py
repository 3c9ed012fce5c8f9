"""Batches continuously in plain Python: chooses each step's requests and commits verdicts to them. Holds no tensor."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from echo_rl.contracts import RequestOutput, TokenLogprob
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens of one sequence to process now; after the `last` chunk it samples its first token."""

    sequence: Sequence
    count: int
    last: bool


@dataclass(frozen=True)
class Batch:
    """The requests of one step. Both parts share one forward pass."""

    drafting: tuple[Sequence, ...]
    """Requests with one pending token each, which may speculate."""
    plain: tuple[Sequence, ...]
    """Requests with one pending token each, which want no more."""
    chunks: tuple[Chunk, ...]

    @property
    def decodes(self) -> tuple[Sequence, ...]:
        return self.drafting + self.plain

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All requests of the step, decodes first."""
        return self.decodes + tuple(chunk.sequence for chunk in self.chunks)

    @property
    def sampling(self) -> tuple[Sequence, ...]:
        """All requests that get a token in this step, decodes first."""
        return self.decodes + tuple(chunk.sequence for chunk in self.chunks if chunk.last)

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """First come, first served, over a waiting queue and a running list."""

    def __init__(self, blocks: BlockManager, max_batch: int, prefill_chunk: int, eos: frozenset[int]) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._eos = eos

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Admit what fits, then give every decoding sequence a place and prompts the chunk that is left."""
        while self.waiting and len(self.running) < self._max_batch and self.blocks.admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        chunks, left = [], self._prefill_chunk
        for sequence in self.running:
            if not sequence.decoding and left > 0:
                count = min(sequence.pending, left)
                chunks.append(Chunk(sequence, count, last=count == sequence.pending))
                left -= count
        decodes = [s for s in self.running if s.decoding]
        drafting = tuple(s for s in decodes if s.drafts)
        return Batch(drafting, tuple(s for s in decodes if not s.drafts), tuple(chunks))

    def commit(
        self, sequence: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = ()
    ) -> RequestOutput:
        """Append a verdict's tokens up to the first stop; a finished sequence gives its blocks back.

        `logprobs` are the tokens', or none. The cut takes one token at a time, so it doesn't depend
        on how tokens were grouped into steps.
        """
        params, kept, text, reason = sequence.request.params, [], "", None
        for token in tokens:
            sequence.tokens.append(token)
            kept.append(token)
            if token in self._eos and not params.ignore_eos:
                reason = "stop"
                break
            piece, stopped = sequence.text.push(token)
            text += piece
            if stopped or sequence.output_len >= params.max_new_tokens:
                reason = "stop" if stopped else "length"
                break
        if reason is None:
            return RequestOutput(sequence.id, tuple(kept), text, logprobs=logprobs[: len(kept)])
        text += sequence.text.flush()
        self.remove(sequence)
        return RequestOutput(sequence.id, tuple(kept), text, reason, logprobs=logprobs[: len(kept)])

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        else:
            self.waiting.remove(sequence)
