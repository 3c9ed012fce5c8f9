"""The stream of live data to a viewer, and the count of viewers by which the core sends trees or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

import echo_rl
from echo_rl.server.client.engine_client import EngineClient
from echo_rl.server.specs import public_spec
from echo_rl.server.ui.feed import Event, Feed, encode, experiment_data

FRAME_SECONDS = 0.1
"""Least seconds between two frames."""
IDLE_SECONDS = 1.0
"""Seconds between frames while there are no steps; they also find out whether the viewer is still there."""
MOST_VIEWERS = 16


class Viewers:
    """Streams to every viewer; steps carry trees as long as there is one."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.count = 0

    @property
    def full(self) -> bool:
        return self.count >= MOST_VIEWERS

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yields encoded events until the client's subscription ends or the viewer leaves."""
        feed, updated = Feed(), asyncio.Event()
        self.count += 1
        if self.count == 1:
            self._client.trace_trees(True)
        reader = asyncio.create_task(self._read(feed, updated))
        try:
            yield encode(self._hello())
            while not reader.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(updated.wait(), IDLE_SECONDS)
                updated.clear()
                for event in self._frame(feed):
                    yield encode(event)
                await asyncio.sleep(FRAME_SECONDS)
        finally:
            reader.cancel()
            self.count -= 1
            if self.count == 0:
                self._client.trace_trees(False)

    async def _read(self, feed: Feed, updated: asyncio.Event) -> None:
        """Takes every update at once, so that a slow viewer gets coarser frames rather than gaps."""
        try:
            async for item in self._client.subscribe():
                feed.add(item)
                updated.set()
        finally:
            updated.set()

    def _frame(self, feed: Feed) -> list[Event]:
        client = self._client
        (name, steps), *others = feed.take()
        steps.setdefault("time", time.time())
        own = {"in_flight": client.in_flight, "restarts": client.restarts, "fallbacks": client.fallbacks}
        return [(name, steps | own), *others]

    def _hello(self) -> Event:
        client, info = self._client, self._client.ready_info
        return "hello", {
            "version": echo_rl.__version__,
            "controller": public_spec(client.controller),
            "environment": info.environment if info is not None else {},
            "fallbacks": client.fallbacks,
            "restarts": client.restarts,
            "experiment": experiment_data(client.experiment) if client.experiment is not None else None,
        }
