"""How long a connection stays open on which nothing is sent, on a loop whose clock a test moves on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import tyro
import uvicorn

from echo_rl.cli.serve import Serve
from echo_rl.errors import ConfigError
from echo_rl.server.config import ServerConfig
from echo_rl.server.serve import http_config
from tests.server.engine_clients import until
from tests.server.front_world import FakeEngineClient, make_app

GET = b"GET /health/live HTTP/1.1\r\nHost: here\r\n\r\n"


class MovedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock is ahead of the machine's by `ahead` seconds."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """The status line of an answer, whose whole body is read; nothing where the connection is closed."""
    writer.write(GET)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
    await reader.readexactly(int(length.partition(b":")[2]))
    return head.splitlines()[0]


async def answers_after(idle: float, settings: ServerConfig) -> bool:
    """True where a connection that was idle so long answers once more, False where it was closed meanwhile."""
    loop = asyncio.get_running_loop()
    config = http_config(make_app(FakeEngineClient()), settings)
    config.port = 0
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    assert b"200" in await asked(reader, writer)
    await until(lambda: bool(server.server_state.connections))
    loop.ahead += idle
    closing = asyncio.create_task(reader.read())
    await asyncio.wait((closing,), timeout=0.2)  # by the same clock: a few turns of the loop
    alive = not closing.done()
    if alive:
        closing.cancel()
        await asyncio.wait((closing,))
        assert b"200" in await asked(reader, writer)
    writer.close()
    server.should_exit = server.force_exit = True
    await serving
    return alive


@pytest.mark.parametrize(
    ("idle", "settings", "answers"),
    [
        (6.0, ServerConfig(), True),
        (70.0, ServerConfig(), True),
        (80.0, ServerConfig(), False),
        (6.0, ServerConfig(timeout_keep_alive=5), False),
        (500.0, ServerConfig(timeout_keep_alive=600), True),
    ],
)
def test_an_idle_connection_answers_until_its_time_is_over(idle, settings, answers):
    with asyncio.Runner(loop_factory=MovedLoop) as runner:
        assert runner.run(answers_after(idle, settings)) is answers


def test_the_time_is_an_option_of_serve():
    assert tyro.cli(Serve, args=[]).server.timeout_keep_alive == 75
    assert tyro.cli(Serve, args=["--timeout-keep-alive", "9"]).server.timeout_keep_alive == 9
    with pytest.raises(ConfigError, match="timeout_keep_alive is 0"):
        replace(ServerConfig(), timeout_keep_alive=0)
