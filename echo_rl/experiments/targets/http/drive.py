"""Sends a workload to a server and records what came back, when. The async counterpart of `driver.drive`."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from echo_rl.contracts import Request
from echo_rl.errors import ConfigError
from echo_rl.experiments.targets.http.client import Client
from echo_rl.experiments.targets.http.record import UNKNOWN, LoadRecord
from echo_rl.experiments.targets.http.stream import Stream
from echo_rl.workloads.arrivals import Arrivals
from echo_rl.workloads.records import CUT, RequestRecord, RunRecord

PAUSE = 0.1
"""Seconds that a failed request keeps its place, so that a closed load does not flood a server that fails at once."""


@dataclass(frozen=True)
class Ends:
    """The ends of a run: it is over at whichever comes first."""

    seconds: float | None = None
    """Seconds after which what is in flight is given up and recorded as cut."""
    requests: int | None = None
    """Once so many have been sent and all have ended."""

    def __post_init__(self) -> None:
        given = [end for end in (self.seconds, self.requests) if end is not None]
        if not given or min(given) <= 0:
            found = f"(seconds {self.seconds}, requests {self.requests})"
            raise ConfigError(f"a block needs an end: give seconds or requests above 0 {found}")


async def drive(
    client: Client,
    arrivals: Arrivals,
    source: Callable[[str], Request],
    body: Callable[[Request], bytes],
    ends: Ends,
    max_concurrency: int | None = None,
    name: str = "",
) -> LoadRecord:
    """`source(suite)` gives the next request of a suite, `body` what is sent for it; `name` is the arm's.

    A request's times count from its arrival, not from when it was sent: one that `max_concurrency` or
    this client held back waited all the same. A server says how many tokens an answer has once it ends; one that is cut
    counts as many for its characters as the run's others had, since a chunk holds more tokens of some controllers than
    of others. Raises what `source` raises, nothing for a failing server.
    """
    run = _Run(client, arrivals, source, body, ends, max_concurrency)
    cpu, retries = time.process_time(), client.retries
    await run.to_its_end()
    seconds, cpu = run.now(), time.process_time() - cpu
    ended = [run.done[order] for order in sorted(run.done)]
    density = _density([one.stream for one in ended])
    return LoadRecord(
        run=RunRecord(name, run.most, seconds, tuple(one.record(density) for one in ended), ()),
        texts=tuple(one.stream.text for one in ended),
        chunks=sum(len(one.stream.texts) for one in ended),
        retries=client.retries - retries,
        client_cpu_seconds=cpu,
    )


class _Run:
    def __init__(
        self,
        client: Client,
        arrivals: Arrivals,
        source: Callable[[str], Request],
        body: Callable[[Request], bytes],
        ends: Ends,
        max_concurrency: int | None,
    ) -> None:
        self.client, self.arrivals, self.source, self.body = client, arrivals, source, body
        self.seconds, self.requests = ends.seconds or math.inf, ends.requests or sys.maxsize
        self.places = asyncio.Semaphore(max_concurrency or sys.maxsize)
        self.ended = asyncio.Event()
        self.seen = 0.0  # all arrivals up to here are added
        self.sent = self.in_flight = self.most = 0
        self.done: dict[int, _Ended] = {}
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    async def to_its_end(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = set()
            while self.sent < self.requests or self.in_flight:
                now = min(self.now(), self.seconds)
                for arrival, suite in self._due(now):
                    tasks.add(task := group.create_task(self._one(self.sent, self.source(suite), arrival)))
                    task.add_done_callback(tasks.discard)
                    self.sent, self.in_flight = self.sent + 1, self.in_flight + 1
                    self.most = max(self.most, self.in_flight)
                if now == self.seconds:
                    break
                await self._wait()
            await asyncio.sleep(0)  # what arrived while this client was held back has begun, so it is recorded too
            for task in tasks:
                task.cancel()

    def _due(self, now: float) -> list[tuple[float, str]]:
        """The arrival and suite of each request that came before the end; no more than are still to be sent."""
        found = self.arrivals.since(self.seen, now, self.in_flight)
        self.seen = now
        return [(arrival, suite) for arrival, suite in found if arrival < self.seconds][: self.requests - self.sent]

    async def _wait(self) -> None:
        """Wait until a request ends, the next one is due or the time is up."""
        upcoming = self.arrivals.next_time(self.seen) if self.sent < self.requests else None
        until = min(self.seconds, math.inf if upcoming is None else upcoming)
        self.ended.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if until == math.inf else max(0.0, until - self.now())):
                await self.ended.wait()

    async def _one(self, order: int, request: Request, arrival: float) -> None:
        stream = Stream(self.now)
        cut = False
        try:
            async with self.places:
                await self.client.complete(self.body(request), stream)
        except asyncio.CancelledError:
            cut = True
        self.done[order] = _Ended(request, arrival, self.now(), stream, cut)
        if stream.error is not None and not cut:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(PAUSE)
        self.in_flight -= 1
        self.ended.set()


@dataclass(frozen=True)
class _Ended:
    """A request that the run is done with."""

    request: Request
    arrival: float
    finish: float
    stream: Stream
    cut: bool

    def record(self, density: float) -> RequestRecord:
        """`density`: tokens a character, for an answer that was cut."""
        times = self.stream.token_times(density if self.cut else 0.0)
        error = None if self.cut else self.stream.error
        return RequestRecord(
            id=self.request.id,
            prompt_tokens=self.stream.prompt_tokens,
            arrival=self.arrival,
            finish=self.finish,
            tokens=(UNKNOWN,) * len(times),
            token_times=tuple(times),
            finish_reason=CUT if self.cut else "error" if error else str(self.stream.finish_reason),
            error=error,
        )


def _density(streams: Sequence[Stream]) -> float:
    """Tokens a character, of the answers whose tokens the server counted; 0 where there is none."""
    counted = [stream for stream in streams if stream.completion_tokens]
    characters = sum(len(stream.text) for stream in counted)
    return sum(stream.completion_tokens for stream in counted) / characters if characters else 0.0
