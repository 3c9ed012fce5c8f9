"""A server's HTTP address and the exchanges with it, by aiohttp. Knows nothing of what is asked.

A body is handed on as it comes; only that of an error is kept.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from aiohttp import (
    ClientConnectionError,
    ClientConnectorError,
    ClientPayloadError,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    TraceConfig,
)
from yarl import URL

from echo_rl.errors import ConfigError

Sink = Callable[[bytes], None]
T = TypeVar("T")
OK = 200
MOST_KEPT = 1 << 20
"""Bytes of a body that nobody takes; what comes after them is dropped."""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop where that is installed: a chunk then costs a client half as much.

    The garbage collector passes over what there was before: it would hold up all streams for a tenth of a second.
    """
    fast = importlib.util.find_spec("uvloop") is not None
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=importlib.import_module("uvloop").new_event_loop if fast else None) as runner:
            return runner.run(work)
    finally:
        gc.unfreeze()


@dataclass
class Answer:
    """A response. `body` is filled where no sink took it."""

    status: int = 0
    retry_after: float | None = None
    """Seconds that the server asks to wait; None where it says nothing, or a date."""
    body: bytearray = field(default_factory=bytearray)
    reused: bool = False
    """The request was sent over a connection that an earlier one had left open."""


class ProtocolError(Exception):
    """The peer sent something that is not what was agreed on."""


class Endpoint:
    """A server's address and a session of kept-alive connections to it. Belongs to one event loop; close it there."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` with or without ``/v1`` at its end; `key` is sent as a bearer token. Raises `ConfigError`."""
        try:
            address = URL(url)
        except ValueError as error:
            raise ConfigError(f"the server is {url!r} ({error}); give a URL like http://127.0.0.1:8000") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ConfigError(f"the server is {url!r}; give a URL like http://127.0.0.1:8000")
        self._base = f"{address.origin()}{address.raw_path.rstrip('/').removesuffix('/v1')}"
        self._key = key
        self._session: ClientSession | None = None

    async def fetch(
        self, method: str, path: str, body: bytes = b"", sink: Sink | None = None, key: str | None = None
    ) -> Answer:
        """One exchange; `sink` takes the body of a 200 piece by piece, and `key` is sent instead of the endpoint's own.

        Raises `OSError` where the server can't be reached or hangs up, and `ProtocolError`.
        """
        bearer = key or self._key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
        while True:
            answer = Answer()
            try:
                await self._exchange(answer, sink, method=method, url=self._base + path, data=body, headers=headers)
                return answer
            except ClientConnectorError:
                raise
            except (ClientConnectionError, ClientPayloadError) as error:
                if answer.status or not answer.reused:  # else it was closed while it lay idle: try the next
                    raise ConnectionResetError("the server closed the connection") from error
            except ClientResponseError as error:
                raise ProtocolError(" ".join(error.message.split())) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _exchange(self, answer: Answer, sink: Sink | None, **request: Any) -> None:
        self._session = self._session or _session()
        async with self._session.request(**request, allow_redirects=False, trace_request_ctx=answer) as response:
            answer.status = response.status
            wait = response.headers.get("Retry-After", "").strip()
            answer.retry_after = float(wait) if wait.isdecimal() else None
            async for piece in response.content.iter_any():
                if sink is not None and answer.status == OK:
                    sink(piece)
                elif len(answer.body) < MOST_KEPT:
                    answer.body += piece


def _session() -> ClientSession:
    """Without limits of its own, cookies or compression: what is measured is the server."""
    tracing = TraceConfig()
    tracing.on_connection_reuseconn.append(_mark_reused)
    return ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None),
        cookie_jar=DummyCookieJar(),
        skip_auto_headers=("Accept-Encoding",),
        trace_configs=[tracing],
    )


async def _mark_reused(session: ClientSession, context: SimpleNamespace, event: Any) -> None:
    del session, event
    context.trace_request_ctx.reused = True  # the answer
