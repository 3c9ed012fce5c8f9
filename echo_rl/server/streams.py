"""What the front iterates over: the outputs of one request, and the news of every step. One event loop, no threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from echo_rl.contracts import RequestOutput
from echo_rl.server.messages import ExperimentReport, StepStats

T = TypeVar("T")
News = StepStats | ExperimentReport

SLOW_READER = 256
"""News that wait for a subscriber before the oldest are dropped."""


class Inbox(Generic[T]):
    """Items for one reader, who waits for the next. Ends after `end`, once all are taken."""

    def __init__(self, limit: int | None = None) -> None:
        self._items: deque[T] = deque(maxlen=limit)
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def get(self) -> T:
        """Raises `StopAsyncIteration` at the end."""
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class OutputStream:
    """The outputs of one request, up to one with a finish reason; or the error that refused it.

    Whoever stops reading early calls `aclose` (``contextlib.aclosing`` does), or is cancelled while
    it waits: the request is then cancelled, too.
    """

    def __init__(self, request_id: str, leave: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._leave = leave
        self._inbox: Inbox[RequestOutput | Exception] = Inbox()

    def put(self, item: RequestOutput | Exception) -> None:
        self._inbox.put(item)
        if isinstance(item, Exception) or item.finish_reason is not None:
            self._inbox.end()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        try:
            item = await self._inbox.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        """Cancels the request if it isn't finished; nothing more is read then."""
        self._leave(self.request_id)
        self._inbox.end()


class Subscription:
    """Steps and experiment reports from now on; a slow reader misses the oldest."""

    def __init__(self, leave: Callable[[Subscription], None]) -> None:
        self._leave = leave
        self._inbox: Inbox[News] = Inbox(SLOW_READER)
        self.put, self.end = self._inbox.put, self._inbox.end

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> News:
        try:
            return await self._inbox.get()
        except (asyncio.CancelledError, StopAsyncIteration):
            self._leave(self)
            raise

    async def aclose(self) -> None:
        self._leave(self)
        self.end()
