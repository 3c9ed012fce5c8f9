"""One HTTP request from its arrival to its last byte: what is logged and measured of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499
"""Status of a request whose client left before the answer."""
CUT_OFF = ("cancelled", "error")
"""Finish reasons of completions that were not served to their end."""
KEY = "echo_rl.trail"


@dataclass
class RequestStats:
    """Written by whoever serves the request. Times are of `time.perf_counter`, in seconds."""

    id: str
    started: float
    route: str = "unmatched"
    """Of the application, not the path that was asked for: few, and free of what clients write."""
    status: int | None = None
    streamed: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    finished: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    """Of every completion, also of those that were cut off."""

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    @property
    def e2e(self) -> float | None:
        return None if self.finished is None else self.finished - self.started


def stats_of(scope: Scope) -> RequestStats:
    """The trail that `RequestStatsMiddleware` gave this request."""
    trail: RequestStats = scope[KEY]
    return trail


class RequestStatsMiddleware:
    """ASGI middleware, outermost: gives each request its trail and id, and hands it over at its end."""

    def __init__(self, app: ASGIApp, done: Callable[[RequestStats], None]) -> None:
        self._app = app
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trail = RequestStats(uuid.uuid4().hex, time.perf_counter())
        scope[KEY] = trail

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trail.status = trail.status or message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", trail.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            trail.finished = time.perf_counter()
            trail.route = getattr(scope.get("route"), "path", trail.route)
            trail.status = trail.status or 500  # nobody answered: the outermost handler does
            self._done(trail)
