"""Runs the server: engine client and HTTP API in one event loop, from loading to the last drained request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import disable_created_metrics

from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError
from echo_rl.runtime.models.locate import pinned, resolve_model
from echo_rl.runtime.tokenizer import Tokenizer
from echo_rl.server import logs
from echo_rl.server.api.app import create_app
from echo_rl.server.api.auth import Keys, is_loopback
from echo_rl.server.api.completion_response import LAST_BYTES_SECONDS
from echo_rl.server.api.front import Front
from echo_rl.server.client.engine_client import EngineClient, SupervisorConfig
from echo_rl.server.config import ServerConfig
from echo_rl.server.core.worker import load_live_engine, with_logging
from echo_rl.server.process import freeze_gc_heap, use_batch_scheduling

if TYPE_CHECKING:
    from fastapi import FastAPI

    from echo_rl.runtime.engine import Engine

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
log = logging.getLogger(__name__)
LoadEngine = Callable[[EngineConfig], "tuple[Engine, dict[str, str]]"]


def serve(engine: EngineConfig, server: ServerConfig, controller: str, load: LoadEngine) -> int:
    """Serves until a signal and returns the exit code. Raises what is wrong with the settings, the model or the engine.

    `load`, a module's function, loads the engine in its own process and returns it with what timings depend on.

    The port opens once the model's files are here, and answers from then on, with 503 until the engine is loaded. The
    first SIGTERM or SIGINT lets requests in flight finish, up to `drain_seconds`; a second one ends them.
    """
    keys = Keys.load(server)
    logs.configure(server.log_format)
    disable_created_metrics()
    engine = pinned(engine)  # an engine that is started again shall load the same files
    tokenizer = Tokenizer.load(resolve_model(engine.model, engine.revision))
    with listen(server.host, server.port) as listener:
        factory = partial(with_logging, server.log_format, partial(load_live_engine, load, engine))
        client = EngineClient(SupervisorConfig(controller=controller), factory)
        bound = replace(server, host=listener.getsockname()[0])
        if keys.admin is None and is_loopback(bound.host):
            log.warning(
                "there is no admin key, so whoever reaches %s may use /admin: give one before a proxy or a forwarded "
                "port leads here",
                bound.host,
            )
        app = create_app(client, tokenizer, bound, keys, engine.model)
        config = http_config(app, bound)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_run(_Server(config), client, app.state.front, listener))


def http_config(app: FastAPI, server: ServerConfig) -> uvicorn.Config:
    """Returns how the application is served over HTTP: who is believed, and when a connection ends."""
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a forged peer address would open /admin
        timeout_keep_alive=server.timeout_keep_alive,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket: IPv4 where a name has addresses of both kinds, both for ``::``.

    Raises `ConfigError` where the address can't be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error


class _Server(uvicorn.Server):
    """A server that leaves signals to `_run`, which drains requests first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(server: _Server, client: EngineClient, front: Front, listener: socket.socket) -> int:
    drain, at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, lambda: (at_once if drain.is_set() else drain).set())
    use_batch_scheduling()
    address, port = listener.getsockname()[:2]
    logs.write("listening", url=f"http://{f'[{address}]' if ':' in address else address}:{port}", model=front.model)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await _until_signal(client, front, drain, serving)
        return await _drain(client, front, at_once)
    finally:
        server.should_exit = True
        server.force_exit = at_once.is_set()
        await client.stop()
        await serving


async def _until_signal(client: EngineClient, front: Front, drain: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Loads the engine and serves until a signal. Raises what keeps the engine from loading."""
    waiting = asyncio.create_task(drain.wait())
    starting = asyncio.create_task(client.start())
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            freeze_gc_heap()
            logs.write("ready", **front.loaded_engine().environment, controller=client.controller)
            await asyncio.wait((waiting, serving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (waiting, starting):
            task.cancel()
        await asyncio.gather(waiting, starting, return_exceptions=True)


async def _drain(client: EngineClient, front: Front, at_once: asyncio.Event) -> int:
    """Refuses new requests and waits for the others. Returns the exit code: 130 where a second signal cut it short."""
    front.draining = True
    logs.write("draining", in_flight=client.in_flight)
    draining = asyncio.create_task(client.drain(front.config.drain_seconds))
    hurry = asyncio.create_task(at_once.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurry):
        task.cancel()
    await asyncio.gather(draining, hurry, return_exceptions=True)
    logs.write("stopped")
    return INTERRUPTED if at_once.is_set() else 0
