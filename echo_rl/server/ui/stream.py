"""One viewer's stream of live data, and the count of viewers that tells the core whether to send trees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, Protocol

import echo_rl
from echo_rl.server.api.choices import public
from echo_rl.server.messages import ExperimentReport, Ready, StepStats
from echo_rl.server.ui.feed import Event, Feed, encode, experiment_data

FRAME_SECONDS = 0.1
"""Least time between two frames."""
IDLE_SECONDS = 1.0
"""Without steps a frame that says so is sent this often; it also finds out whether the viewer is still there."""
MOST_VIEWERS = 16


class LiveHost(Protocol):
    """What the live view needs of a host; `echo_rl.server.client.engine_client.EngineClient` is one."""

    @property
    def ready(self) -> bool: ...
    @property
    def ready_info(self) -> Ready | None: ...
    @property
    def controller(self) -> str: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def fallbacks(self) -> dict[str, int]: ...
    @property
    def experiment(self) -> ExperimentReport | None: ...
    def subscribe(self) -> AsyncIterator[StepStats | ExperimentReport]: ...
    def watch(self, trees: bool) -> Awaitable[Any]: ...


class Viewers:
    """Streams to every viewer; steps carry trees from the first one's coming to the last one's going."""

    def __init__(self, host: LiveHost) -> None:
        self._host = host
        self._count = 0
        self._telling: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly

    @property
    def count(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= MOST_VIEWERS

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded events until the host's subscription ends or the viewer goes."""
        # A viewer that goes leaves through a cancellation, in which nothing can be awaited any more.
        feed, news = Feed(), asyncio.Event()
        self._enter()
        reader = asyncio.create_task(self._read(feed, news))
        try:
            yield encode(self._hello())
            while not reader.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), IDLE_SECONDS)
                news.clear()
                for event in self._frame(feed):
                    yield encode(event)
                await asyncio.sleep(FRAME_SECONDS)
        finally:
            reader.cancel()
            self._leave()

    async def _read(self, feed: Feed, news: asyncio.Event) -> None:
        """Takes every item at once, so that a slow viewer gets coarser frames rather than gaps."""
        try:
            async for item in self._host.subscribe():
                feed.add(item)
                news.set()
        finally:
            news.set()

    def _frame(self, feed: Feed) -> list[Event]:
        host = self._host
        (name, steps), *others = feed.take()
        steps.setdefault("time", time.time())
        own = {"in_flight": host.in_flight, "restarts": host.restarts, "fallbacks": host.fallbacks}
        return [(name, steps | own), *others]

    def _hello(self) -> Event:
        host, info = self._host, self._host.ready_info
        return "hello", {
            "version": echo_rl.__version__,
            "controller": public(host.controller),
            "environment": info.environment if info is not None else {},
            "fallbacks": host.fallbacks,
            "restarts": host.restarts,
            "experiment": experiment_data(host.experiment) if host.experiment is not None else None,
        }

    def _enter(self) -> None:
        self._count += 1
        if self._count == 1:
            self._tell(True)

    def _leave(self) -> None:
        self._count -= 1
        if self._count == 0:
            self._tell(False)

    def _tell(self, trees: bool) -> None:
        task = asyncio.create_task(self._watch(trees))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _watch(self, trees: bool) -> None:
        await self._host.watch(trees)
