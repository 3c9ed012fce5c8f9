"""Measures one HTTP request from its arrival to its last byte, for the log and the metrics."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499
"""Status of a request whose client left before the answer was complete."""
CUT_OFF = ("cancelled", "error")
"""Finish reasons of completions that were not served to their end."""
KEY = "echo_rl.request_stats"


@dataclass
class RequestStats:
    """The statistics of a request, which its response writes. Times are of `time.perf_counter`, in seconds."""

    id: str
    started: float
    route: str = "unmatched"
    """The application's route, not the path that was asked for: few, and free of what clients write."""
    status: int | None = None
    streamed: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    finished: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    """Finish reasons of all completions, also of those that were cut off."""

    @property
    def log_fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "stream": self.streamed,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft": self._until(self.first_token),
            "e2e": self._until(self.finished),
            "finish_reason": ",".join(self.finish_reasons) or None,
        }

    def _until(self, end: float | None) -> float | None:
        return None if end is None else round(end - self.started, 4)


class RequestStatsMiddleware:
    """Outermost ASGI middleware: gives each request its statistics and id, and calls `done` with them at its end."""

    def __init__(self, app: ASGIApp, done: Callable[[RequestStats], None]) -> None:
        self._app = app
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stats = RequestStats(uuid.uuid4().hex, time.perf_counter())
        scope[KEY] = stats

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = stats.status or message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", stats.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            stats.finished = time.perf_counter()
            stats.route = getattr(scope.get("route"), "path", stats.route)
            stats.status = stats.status or 500  # no answer was begun: the outermost handler gives it
            self._done(stats)
