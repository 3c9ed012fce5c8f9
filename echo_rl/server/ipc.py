"""Messages over a stream socket between the client and the core: asyncio on one side, threads on the other.

A frame is the length of its body (4 bytes, big endian) and the body, a pickle. The two ends are one program, parent
and child over a socket that has no name, so unpickling is safe. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, cast

HEADER = struct.Struct(">I")
SEND_BUFFER = 1 << 20
"""Bytes of events that may wait for a busy client before the core waits, too."""


def frame(message: Any) -> bytes:
    """Returns the message as it is sent."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class CoreChannel:
    """The core's end. A thread reads commands, so that the client never waits for a step to end."""

    def __init__(self, sock: socket.socket, last_command: Any, on_lost: Callable[[], None] | None = None) -> None:
        """Once the client is gone, `last_command` is received and `on_lost` called, in the reading thread."""
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock, self._last_command, self._on_lost = sock, last_command, on_lost
        self._commands: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def send(self, event: Any) -> None:
        """Raises `OSError` where the client is gone."""
        self._sock.sendall(frame(event))

    def receive(self, timeout: float | None = 0.0) -> list[Any]:
        """Returns every command that is there; waits up to `timeout` seconds (None: for ever) for the first."""
        commands = []
        try:
            commands.append(self._commands.get_nowait() if timeout == 0.0 else self._commands.get(timeout=timeout))
            while True:
                commands.append(self._commands.get_nowait())
        except Empty:
            return commands

    def close(self) -> None:
        """Ends the stream after the last event, and with it the reading thread."""
        with contextlib.suppress(OSError):  # the client went first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as stream:
                while len(header := stream.read(HEADER.size)) == HEADER.size:
                    (length,) = HEADER.unpack(header)
                    self._commands.put(pickle.loads(stream.read(length)))
        except (OSError, EOFError, pickle.UnpicklingError):
            pass  # cut off within a frame: the client has exited
        self._commands.put(self._last_command)
        if self._on_lost is not None:
            self._on_lost()


class ClientChannel(asyncio.Protocol):
    """The client's end: `on_event` gets every event, `on_lost` the end of the stream. Never blocks."""

    def __init__(self, on_event: Callable[[Any], None], on_lost: Callable[[], None]) -> None:
        self._on_event, self._on_lost = on_event, on_lost
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    async def open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def send(self, command: Any) -> None:
        """Queues a command; it is dropped where the core is gone, which `on_lost` tells."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(command))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        buffer, begin = self._buffer, 0
        buffer += data
        while len(buffer) - begin >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, begin)
            end = begin + HEADER.size + length
            if len(buffer) < end:
                break
            event = pickle.loads(bytes(buffer[begin + HEADER.size : end]))
            begin = end
            self._on_event(event)
        del buffer[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
