"""What the front iterates over: the outputs of its requests, and the news of every step. One event loop, no threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
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
        if not await self._filled():
            raise StopAsyncIteration
        return self._items.popleft()

    async def take(self) -> list[T]:
        """All that are there; waits for the first. Nothing at the end."""
        await self._filled()
        items = list(self._items)
        self._items.clear()
        return items

    async def _filled(self) -> bool:
        """Waits for an item. False where there is none and the end has come."""
        while not self._items and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return bool(self._items)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class OutputStream:
    """The outputs of some requests, each up to one with a finish reason; or the error that refused one of them.

    Whoever stops reading early calls `aclose` (``contextlib.aclosing`` does), or is cancelled while
    it waits: what is not finished is then cancelled, too.
    """

    def __init__(self, request_ids: Sequence[str], leave: Callable[[str], None]) -> None:
        self._unfinished = list(request_ids)
        self._leave = leave
        self._inbox: Inbox[RequestOutput | Exception] = Inbox()
        self._taken: deque[RequestOutput] = deque()

    def put(self, item: RequestOutput | Exception) -> None:
        self._inbox.put(item)
        if isinstance(item, Exception):
            self._inbox.end()
        elif item.finish_reason is not None:
            self._unfinished.remove(item.id)
            if not self._unfinished:
                self._inbox.end()

    async def take(self) -> list[RequestOutput]:
        """All outputs since the last time; waits for the first. Nothing at the end."""
        try:
            items = await self._inbox.take()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        outputs = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            outputs.append(item)
        return outputs

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    async def aclose(self) -> None:
        """Cancels what isn't finished; nothing more is read then."""
        for request_id in self._unfinished:
            self._leave(request_id)
        self._unfinished = []
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
