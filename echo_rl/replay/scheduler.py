"""Simulated servers side by side: which requests are in a step and how far each has come. Knows no time and no forest.

Mirrors the live scheduler (first come first served, chunked prefill beside decoding); memory is taken to
suffice. Shapes: E servers, N running requests server by server in order of admission, R of them decoding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rl.costs.batched_records import BatchedLoadView
from echo_rl.errors import ConfigError
from echo_rl.replay.trace import Trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SERVER, TICKET, RESPONSE, EMITTED, LEFT, SERVED, UNSEEN, FIRST, PROMPT, LENGTH = range(10)
"""Rows of the state: where, who, which recorded response, tokens it has got, prompt tokens still to process and how
many of them in the coming step, committed tokens that the drafter hasn't seen; then what is fixed for a response:
its first position in the trace, its prompt's tokens and its own."""


@dataclass(frozen=True)
class ReplaySchedulerOptions:
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
class ScheduledStep:
    """The requests that take part in the servers' coming step."""

    loads: BatchedLoadView
    counts: Ints  # [E] decoding requests
    places: Ints  # [R] of the decoding requests among the running ones
    servers: Ints  # [R] as all that follows
    tickets: Ints  # as `ReplayScheduler.add` gave them
    responses: Ints
    emitted: Ints  # tokens that each has already got
    room: Ints  # tokens that each may still get
    positions: Ints  # rows of the trace's levels
    unseen: Floats  # [E] committed tokens that the drafter would have to catch up on, past two a request
    prompts: Ints  # [3, Q] server, ticket and response of those whose prompt ends here: each gets its first token


@dataclass(frozen=True)
class CommittedStep:
    """The tokens that a step brought its requests."""

    kept: Ints  # [R] tokens of each decoding request, not counting any past its end
    ended: frozenset[int]  # tickets of finished requests, those that ended with their first token included


class ReplayScheduler:
    """Queues requests (`add`), then forms and ends steps: `schedule` and `commit`."""

    def __init__(self, trace: Trace, options: ReplaySchedulerOptions, count: int = 1) -> None:
        self.options, self.count = options, count
        sizes = [(len(r.prompt), r.length) for r in trace.responses]
        self._facts = np.array([trace.first, *zip(*sizes, strict=True)])  # rows FIRST to LENGTH, by response
        self._waiting: list[deque[tuple[int, int]]] = [deque() for _ in range(count)]  # (ticket, response)
        self._state = np.zeros((10, 0), dtype=np.int64)  # [10, N] see the row names above
        self._running = [0] * count
        self._arrived: list[list[int]] = [[] for _ in range(count)]  # tickets since the last step
        self._tickets = 0

    def clear(self, server: int = 0) -> None:
        """Drop every request of a server."""
        self._waiting[server].clear()
        self._arrived[server].clear()
        self._keep(self._state[SERVER] != server)

    def in_flight(self, server: int = 0) -> int:
        """The number of requests of a server, waiting and running."""
        return len(self._waiting[server]) + self._running[server]

    def add(self, response: int, server: int = 0) -> int:
        """Queue a request for this response and give its ticket."""
        self._tickets += 1
        self._waiting[server].append((self._tickets, response))
        self._arrived[server].append(self._tickets)
        return self._tickets

    def drop(self, ticket: int) -> None:
        """Take a request out, waiting or running."""
        self._waiting = [deque(item for item in queue if item[0] != ticket) for queue in self._waiting]
        self._arrived = [[other for other in new if other != ticket] for new in self._arrived]
        self._keep(self._state[TICKET] != ticket)

    def schedule(self) -> ScheduledStep:
        """Admit what fits and form the step, which an `add` leaves as it is and a `drop` takes apart."""
        self._admit()
        state = self._state
        prefilling = state[LEFT] > 0
        ending = state[:, prefilling & (state[SERVED] == state[LEFT])]
        places = np.flatnonzero(~prefilling)
        decoding = state[:, places]
        servers = decoding[SERVER]
        counts = np.bincount(servers, minlength=self.count)
        return ScheduledStep(
            self._loads(decoding, counts),
            counts,
            places,
            servers,
            decoding[TICKET],
            decoding[RESPONSE],
            decoding[EMITTED],
            decoding[LENGTH] - decoding[EMITTED],
            decoding[FIRST] + decoding[EMITTED] - 1,
            sums(servers, np.maximum(decoding[UNSEEN] - 2, 0), self.count),
            ending[[SERVER, TICKET, RESPONSE]],
        )

    def commit(self, step: ScheduledStep, accepted: Ints, drafted: NDArray[np.bool_]) -> CommittedStep:
        """Advance by the accepted nodes ([R]) and a bonus token each; finished requests leave. `drafted` is [E]."""
        new = accepted + 1
        kept = np.minimum(new, step.room)
        self._state[EMITTED, step.places] += kept
        unseen = self._state[UNSEEN, step.places]
        self._state[UNSEEN, step.places] = np.where(drafted[step.servers], new, unseen + new)
        for arrived, counted in zip(self._arrived, step.loads.arrived.tolist(), strict=True):
            del arrived[: int(counted)]
        return CommittedStep(kept, self.prefill(np.ones(self.count, dtype=bool)))

    def prefill(self, servers: NDArray[np.bool_]) -> frozenset[int]:
        """Process the step's prompt tokens in these servers ([E]), which may be all that they do in it.

        Finished requests leave; their tickets.
        """
        state = self._state
        if state[SERVED].any():
            served = np.where(servers[state[SERVER]], state[SERVED], 0)
            ending = (served > 0) & (served == state[LEFT])
            state[EMITTED, ending], state[UNSEEN, ending] = 1, state[PROMPT, ending]
            state[LEFT] -= served
            state[SERVED] -= served
        over = state[EMITTED] >= state[LENGTH]
        if not over.any():
            return frozenset()
        self._keep(~over)
        return frozenset(state[TICKET, over].tolist())

    def _loads(self, decoding: Ints, counts: Ints) -> BatchedLoadView:
        """The load of the step as controllers see it."""
        state, options = self._state, self.options
        held = state[PROMPT] - state[LEFT] + state[SERVED] + state[EMITTED]
        blocks = sums(state[SERVER], -(-held // options.block_size), self.count)
        context = sums(decoding[SERVER], decoding[PROMPT] + decoding[EMITTED] - 1, self.count)
        return BatchedLoadView(
            batch=counts.astype(np.float64),
            prefill=sums(state[SERVER], state[SERVED], self.count),
            waiting=np.array([float(len(queue)) for queue in self._waiting]),
            context=context / np.maximum(counts, 1),
            kv_used=np.minimum(1.0, blocks * options.block_size / options.kv_tokens),
            arrived=np.array([float(len(new)) for new in self._arrived]),
        )

    def _admit(self) -> None:
        """Take requests in where there is room, and give each server's prompts the chunk, in order."""
        new = []
        for server, queue in enumerate(self._waiting):
            room = min(len(queue), self.options.max_batch - self._running[server]) if queue else 0
            new += [(server, *queue.popleft()) for _ in range(room)]
            self._running[server] += room
        if new:
            fresh = np.zeros((len(self._state), len(new)), dtype=np.int64)
            fresh[[SERVER, TICKET, RESPONSE]] = np.array(new).T
            fresh[FIRST:] = self._facts[:, fresh[RESPONSE]]
            fresh[LEFT] = fresh[PROMPT]
            state = np.concatenate([self._state, fresh], axis=1)
            self._state = state[:, np.argsort(state[SERVER], kind="stable")]
        at = np.flatnonzero(self._state[LEFT])
        if len(at):
            servers, left = self._state[SERVER, at], self._state[LEFT, at]
            ahead = left.cumsum() - left
            ahead -= ahead[np.searchsorted(servers, servers)]  # prompt tokens before them, of the same server
            self._state[SERVED, at] = np.clip(self.options.prefill_chunk - ahead, 0, left)

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._state = self._state[:, kept]
        self._running = np.bincount(self._state[SERVER], minlength=self.count).tolist()


def sums(servers: Ints, values: NDArray[Any], count: int) -> Floats:
    """[E] sums of the values that belong to each of `count` servers."""
    totals: NDArray[Any] = np.bincount(servers, weights=values, minlength=count)
    return totals
