"""The server's bounds: on completions at once, and on the bytes of a request."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_rl.server.api.errors import ApiError

REMEMBERED = 64
"""Past completions whose rate is measured."""
LONGEST_WAIT = 60
"""Most seconds that a client is asked to wait."""


class Admission:
    """Bounds the unfinished completions, and estimates from past ones when a place will be free."""

    def __init__(self, bound: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.bound = bound
        self.unfinished = 0
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    @contextmanager
    def enter(self, count: int) -> Iterator[None]:
        """Holds `count` places. Raises `ApiError` 400 where there never are so many, 429 where not now."""
        if count > self.bound:
            raise ApiError(400, f"one request asks for {count} completions, this server allows {self.bound}", "n")
        if self.unfinished + count > self.bound:
            raise ApiError(
                429,
                f"{self.unfinished} completions are queued or running and {self.bound} are allowed; try again later",
                code="queue_full",
                headers={"Retry-After": str(self.retry_after(self.unfinished + count - self.bound))},
            )
        self.unfinished += count
        try:
            yield
        finally:
            self.unfinished -= count
            self._ends.extend([self._clock()] * count)

    def retry_after(self, places: int = 1) -> int:
        """Returns the whole seconds, at least 1, until so many places are free at the rate of the last completions."""
        if len(self._ends) < 2:
            return 1
        each = (self._clock() - self._ends[0]) / len(self._ends)
        return max(1, min(LONGEST_WAIT, math.ceil(places * each)))


class BodyLimit:
    """ASGI middleware that refuses bodies above a size, whether announced or found out while reading."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._limit:
            await self._too_large().response(scope, receive, send)
            return
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, receive_counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._limit} bytes", headers={"Connection": "close"})
