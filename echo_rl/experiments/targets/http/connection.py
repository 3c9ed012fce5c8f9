"""HTTP/1.1 over raw asyncio sockets, parsed by httptools. Knows nothing of what is asked.

A body is handed on as it comes; only that of an error is kept.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

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
    gc.freeze()
    try:
        return _run(work)
    finally:
        gc.unfreeze()


def _run(work: Coroutine[Any, Any, T]) -> T:
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.run(work)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@dataclass
class Answer:
    """A response. `body` is filled where no sink took it."""

    status: int = 0
    retry_after: float | None = None
    """Seconds that the server asks to wait; None where it says nothing, or a date."""
    body: bytearray = field(default_factory=bytearray)


class ProtocolError(Exception):
    """The peer sent something that is not what was agreed on."""


class Connection(asyncio.Protocol):
    """A socket with at most one exchange under way."""

    def __init__(self) -> None:
        self.reusable = False
        self.answer = Answer()
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = None
        self._done: asyncio.Future[None] | None = None
        self._sink: Sink | None = None

    async def exchange(self, request: bytes, sink: Sink | None) -> Answer:
        """`sink` takes the body of a 200 piece by piece. Raises `ConnectionError` and `ProtocolError`."""
        self.answer, self._sink, self._parser = Answer(), sink, HttpResponseParser(self)
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._done = asyncio.get_running_loop().create_future()
        self.reusable = False
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done = None
            if not self.reusable:
                self.close()
        return self.answer

    def close(self) -> None:
        """At once, so that a server sees an unfinished request as given up."""
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------ called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._parser is None or self._done.done():
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            cause = error.__context__ or error.__cause__ or error
            self._fail(ProtocolError(str(cause) or type(cause).__name__))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable, self._transport = False, None
        self._fail(ConnectionResetError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # ------------------------------------------------------------------ called by httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.strip().isdigit():
            self.answer.retry_after = float(value)

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._sink is not None and self.answer.status == OK:
            self._sink(body)
        elif len(self.answer.body) < MOST_KEPT:
            self.answer.body += body

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self.answer.status >= OK and self._done is not None and not self._done.done():
            self.reusable = self._parser.should_keep_alive()
            self._done.set_result(None)


class Endpoint:
    """A server's address and the connections to it that are free. Belongs to one event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` with or without ``/v1`` at its end; `key` is sent as a bearer token. Raises `ConfigError`."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"the server is {url!r} ({error}); give a URL like http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"the server is {url!r}; give a URL like http://127.0.0.1:8000")
        self.tls = parts.scheme == "https"
        self.host, self.port = host, port or (443 if self.tls else 80)
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        self._key = key
        self._free: list[Connection] = []

    async def fetch(
        self, method: str, path: str, body: bytes = b"", sink: Sink | None = None, key: str | None = None
    ) -> Answer:
        """One exchange; `key` instead of the endpoint's own. Raises `OSError` and `ProtocolError`."""
        bearer = key or self._key
        secret = f"Authorization: Bearer {bearer}\r\n" if bearer else ""
        head = f"{method} {self.base}{path} HTTP/1.1\r\n{self._headers}{secret}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        while self._free:
            connection = self._free.pop()
            try:
                return self._keep(connection, await connection.exchange(request, sink))
            except ConnectionError:
                if connection.answer.status:  # else it was closed while it lay idle: try the next
                    raise
        connection = await self._connect()
        return self._keep(connection, await connection.exchange(request, sink))

    def close(self) -> None:
        while self._free:
            self._free.pop().close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=self.tls or None)
        return connection

    def _keep(self, connection: Connection, answer: Answer) -> Answer:
        if connection.reusable:
            self._free.append(connection)
        return answer
