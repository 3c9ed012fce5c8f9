"""One simulated server: which requests are in a step and how far each has come. Knows no time and no forest.

Mirrors the live scheduler (first come first served, chunked prefill beside decoding); memory is
taken to suffice. Shapes: n running requests in order of admission, B of them decoding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.contracts import LoadView
from echo_rl.env.trace import Trace
from echo_rl.errors import ConfigError

Ints = NDArray[np.int64]
TICKET, RESPONSE, EMITTED, LEFT, UNSEEN = range(5)
"""Rows of a lane's state: who, which recorded response, tokens it has got, prompt tokens still to process,
committed tokens that the drafter hasn't seen."""


@dataclass(frozen=True)
class LaneOptions:
    """The live engine's limits (`EngineConfig`), which a replay must share with it."""

    max_batch: int = 64
    prefill_chunk: int = 256
    max_nodes: int = 64
    kv_tokens: int = 32_768
    block_size: int = 16

    def __post_init__(self) -> None:
        if min(self.max_batch, self.prefill_chunk, self.max_nodes, self.kv_tokens, self.block_size) < 1:
            raise ConfigError(f"replay limits must be at least 1, not {self}")


@dataclass(frozen=True)
class Turn:
    """Who takes part in a step."""

    decoding: Ints  # [B] places among the running requests
    tickets: Ints  # [B] as `Lane.add` gave them
    responses: Ints  # [B]
    emitted: Ints  # [B] tokens that each has already got
    positions: Ints  # [B] rows of the trace's levels
    unseen: int  # committed tokens that the drafter would have to catch up on, past two a request
    prefill: int  # prompt tokens of this step
    prompts: tuple[tuple[int, int], ...]  # (ticket, response) whose prompt ends here: each gets its first token


@dataclass(frozen=True)
class Gain:
    """What a step brought."""

    kept: Ints  # [B] tokens of each decoding request, not counting any past its end
    ended: frozenset[int]  # tickets of finished requests, those that ended with their first token included


class Lane:
    """`add`, then `turn` and `commit` step by step."""

    def __init__(self, trace: Trace, options: LaneOptions) -> None:
        self.options = options
        self._first = trace.first
        self._prompt = np.array([len(r.prompt) for r in trace.responses])
        self._length = np.array([r.length for r in trace.responses])
        self.clear()

    def clear(self) -> None:
        """Drop every request."""
        self.waiting: deque[tuple[int, int]] = deque()  # (ticket, response)
        self._state = np.zeros((5, 0), dtype=np.int64)  # see the row names below
        self._prefilling = self._arrived = self._tickets = 0

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + self._state.shape[1]

    def add(self, response: int) -> int:
        """Queue a request for this response; its ticket."""
        self._tickets += 1
        self.waiting.append((self._tickets, response))
        self._arrived += 1
        return self._tickets

    def drop(self, ticket: int) -> None:
        """Take a request out, waiting or running."""
        self.waiting = deque(item for item in self.waiting if item[0] != ticket)
        kept = self._state[TICKET] != ticket
        self._prefilling -= int((self._state[LEFT, ~kept] > 0).sum())
        self._state = self._state[:, kept]

    def turn(self) -> Turn:
        """Admit what fits and form the step."""
        room = min(self.options.max_batch - self._state.shape[1], len(self.waiting))
        if room > 0:
            tickets, new = np.array([self.waiting.popleft() for _ in range(room)]).T
            zero = np.zeros_like(new)
            self._state = np.concatenate([self._state, [tickets, new, zero, self._prompt[new], zero]], axis=1)
            self._prefilling += room
        left = self._state[LEFT]
        decoding = np.flatnonzero(left == 0) if self._prefilling else np.arange(left.shape[0])
        prefill, prompts = self._prefill() if self._prefilling else (0, ())
        tickets, responses, emitted, _, unseen = self._state[:, decoding]
        behind = int(np.maximum(unseen - 2, 0).sum())
        positions = self._first[responses] + emitted - 1
        return Turn(decoding, tickets, responses, emitted, positions, behind, prefill, prompts)

    def load(self, turn: Turn) -> LoadView:
        """What a controller sees of it; counts the arrivals since the last call."""
        lengths = self._prompt[turn.responses] + turn.emitted - 1
        arrived, self._arrived = self._arrived, 0
        held = self._prompt[self._state[RESPONSE]] - self._state[LEFT] + self._state[EMITTED]
        blocks = -(-held // self.options.block_size)
        return LoadView(
            batch_size=len(lengths),
            prefill_tokens=turn.prefill,
            waiting=len(self.waiting),
            mean_context=float(lengths.mean()) if len(lengths) else 0.0,
            kv_used=min(1.0, float(blocks.sum()) * self.options.block_size / self.options.kv_tokens),
            max_nodes=self.options.max_nodes,
            arrived=arrived,
        )

    def kept(self, turn: Turn, accepted: Ints) -> Ints:
        """[B] tokens that decoding requests get: accepted nodes and a bonus token, none past their end."""
        return np.minimum(accepted + 1, self._length[turn.responses] - turn.emitted)

    def commit(self, turn: Turn, accepted: Ints, drafted: bool) -> Gain:
        """Advance by the accepted nodes and a bonus token each; finished requests leave."""
        state, at = self._state, turn.decoding
        new, kept = accepted + 1, self.kept(turn, accepted)
        state[EMITTED, at] += kept
        state[UNSEEN, at] = new if drafted else state[UNSEEN, at] + new
        for ticket, response in turn.prompts:
            place = state[TICKET] == ticket
            state[EMITTED, place], state[UNSEEN, place] = 1, self._prompt[response]
        over = state[EMITTED] >= self._length[state[RESPONSE]]
        if not over.any():
            return Gain(kept, frozenset())
        self._state = state[:, ~over]
        return Gain(kept, frozenset(state[TICKET, over].tolist()))

    def _prefill(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Give prompts the chunk, in order; the prompt tokens of this step and whose prompt ends."""
        left, prompts = self.options.prefill_chunk, []
        for place in np.flatnonzero(self._state[LEFT]):
            if left == 0:
                break
            count = min(int(self._state[LEFT, place]), left)
            self._state[LEFT, place] -= count
            left -= count
            if self._state[LEFT, place] == 0:
                prompts.append((int(self._state[TICKET, place]), int(self._state[RESPONSE, place])))
        self._prefilling -= len(prompts)
        return self.options.prefill_chunk - left, tuple(prompts)
