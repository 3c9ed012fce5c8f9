"""Streams that readers of an engine client iterate over: the outputs of requests, and the updates of every step.

Everything belongs to one event loop; there are no threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Self, TypeVar

from echo_rl.contracts import RequestOutput
from echo_rl.server.messages import ExperimentReport, StepStats

T = TypeVar("T")
Update = StepStats | ExperimentReport

SLOW_READER = 256
"""Updates that wait for a subscriber before the oldest are dropped."""


class Inbox(Generic[T]):
    """A queue for one reader. Ends after `end`, once every item is taken."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` is the most items that wait for the reader; the oldest beyond it are dropped."""
        self._items: deque[T] = deque(maxlen=limit)
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def take(self) -> list[T]:
        """Returns every item that is there; waits for the first. Returns none at the end."""
        await self._filled()
        items = list(self._items)
        self._items.clear()
        return items

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if not await self._filled():
            raise StopAsyncIteration
        return self._items.popleft()

    async def _filled(self) -> bool:
        """Waits for an item. Returns False where there is none and the end has come."""
        while not self._items and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return bool(self._items)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class OutputStream(Inbox[RequestOutput]):
    """The outputs of some requests, each up to one with a finish reason; or the error that refused one of them.

    A reader that stops early calls `aclose` (``contextlib.aclosing`` does), or is cancelled while it waits: what is
    not finished is then cancelled, too.
    """

    def __init__(self, request_ids: Sequence[str], cancel: Callable[[str], None]) -> None:
        super().__init__()
        self._unfinished = list(request_ids)
        self._cancel = cancel
        self._error: Exception | None = None

    def put(self, item: RequestOutput) -> None:
        super().put(item)
        if item.finish_reason is not None:
            self._unfinished.remove(item.id)
            if not self._unfinished:
                self.end()

    def fail(self, error: Exception) -> None:
        """Ends the stream; its reader gets `error`."""
        self._error = error
        self.end()

    async def aclose(self) -> None:
        """Cancels what isn't finished; nothing more is read then."""
        for request_id in self._unfinished:
            self._cancel(request_id)
        self._unfinished = []
        self.end()

    async def _filled(self) -> bool:
        try:
            filled = await super()._filled()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self._error is not None:
            raise self._error
        return filled


class Subscription(Inbox[Update]):
    """Steps and experiment reports from now on; a slow reader misses the oldest."""

    def __init__(self, unsubscribe: Callable[[Subscription], None]) -> None:
        super().__init__(SLOW_READER)
        self._unsubscribe = unsubscribe

    async def aclose(self) -> None:
        self._unsubscribe(self)
        self.end()

    async def _filled(self) -> bool:
        filled = False
        try:
            filled = await super()._filled()
        finally:
            if not filled:
                self._unsubscribe(self)
        return filled
