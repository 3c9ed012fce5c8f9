"""Starts the engine core, notices when it exits or hangs, and starts it again. Knows nothing of requests.

Belongs to one asyncio event loop and never blocks it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from echo_rl.errors import ConfigError, EchoError, explain
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.core.worker import Factory, ProcessWorker, ThreadWorker, Worker
from echo_rl.server.ipc import ClientChannel
from echo_rl.server.messages import Event, Failed, Ready, Stop

WORKERS: dict[str, Callable[..., Worker]] = {"process": ProcessWorker, "thread": ThreadWorker}
log = logging.getLogger(__name__)


class Unavailable(EchoError, RuntimeError):
    """The engine serves nothing now: it is loading, restarting, shutting down or given up."""


@dataclass(frozen=True)
class SupervisorConfig:
    controller: str = "echo"
    """Specification of the first controller, as on the command line."""
    isolation: Literal["process", "thread"] = "process"
    """A crash or a hang of the engine in a thread can't be ended, so ``thread`` is for tests and embedding."""
    stall_seconds: float = 60.0
    """Seconds without a step, while requests are in flight, after which the engine counts as hung."""
    start_seconds: float = 1800.0
    """Seconds that loading may take (the first start compiles kernels and fetches weights)."""
    command_seconds: float = 150.0
    """Seconds that a reply of the core may take."""
    stop_seconds: float = 10.0
    """Seconds that the core has to end when told to."""
    most_restarts: int = 5
    """Exits within `restart_window` after which the engine is given up."""
    restart_window: float = 600.0
    """Seconds in which exits are counted."""
    backoff: float = 0.5
    """Seconds before the first restart; they double with every further exit within the window."""
    switch: ControllerManagerOptions = field(default_factory=ControllerManagerOptions)
    """The core's rules for its controllers."""

    def __post_init__(self) -> None:
        if self.isolation not in WORKERS:
            raise ConfigError(f"isolation is '{self.isolation}'; give one of {', '.join(WORKERS)}")


class Listener(Protocol):
    """The engine client as its `EngineSupervisor` sees it."""

    @property
    def in_flight(self) -> int:
        """Returns how many requests the core has, which hangs where it takes no step for them."""
        ...

    def controller_for(self, exits: int) -> str:
        """Returns the controller that the next core starts with, after so many exits in a row."""
        ...

    def on_event(self, event: Event) -> None:
        """Takes every event of a core; `Ready` and `Failed` it hands on to `EngineSupervisor.on_event`."""
        ...

    def on_ready(self, ready: Ready, channel: ClientChannel) -> None:
        """Is called when a core is loaded that takes commands over `channel`."""
        ...

    def on_exit(self, reason: str) -> None:
        """Is called when the core is gone, with all that it held."""
        ...


class EngineSupervisor:
    """Owns the running core. `state`: ``new``, ``loading`` (again), ``ready``, ``dead`` (given up), ``stopped``."""

    def __init__(self, config: SupervisorConfig, factory: Factory, listener: Listener) -> None:
        self._config, self._factory, self._listener = config, factory, listener
        self.worker: Worker | None = None
        self.state: Literal["new", "loading", "ready", "dead", "stopped"] = "new"
        self.restarts = 0
        self.draining = False
        """True while the server shuts down, so that a core which exits is not started again."""
        self._channel: ClientChannel | None = None
        self._loading: asyncio.Future[Ready] | None = None
        self._closed = asyncio.Event()  # the core's stream has ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: str | None = None  # why the core ends, as far as it or the stall watch has said
        self._exits: list[float] = []
        self._last_progress = 0.0

    async def start(self, controller: str) -> None:
        """Raises `EchoError` with what was wrong; nothing runs then."""
        self._spawn(self._watch_for_stalls())
        try:
            await self._launch(controller)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the core for good."""
        was_ready, self.state = self.state == "ready", "stopped"
        for task in self._tasks:
            task.cancel()
        if was_ready:
            assert self._channel is not None
            self._channel.send(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), self._config.stop_seconds)
        await self._reap("the server stopped")

    def note_progress(self) -> None:
        """Notes that the core did something, or was given its first work."""
        self._last_progress = time.monotonic()

    # ------------------------------------------------------------------------- starting

    async def _launch(self, controller: str) -> None:
        config = self._config
        self.state, self._failure, self._closed = "loading", None, asyncio.Event()
        self._loading = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        try:
            self.worker = WORKERS[config.isolation](theirs, self._factory, controller, config.switch)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        atexit.register(self.worker.kill)  # before multiprocessing would wait for it
        channel = self._channel = ClientChannel(self._listener.on_event, lambda: self._on_lost(channel))
        await channel.open(ours)
        try:
            ready = await asyncio.wait_for(self._loading, config.start_seconds)
        except TimeoutError:
            raise Unavailable(f"the engine was not loaded within {config.start_seconds:g} s") from None
        if self._closed.is_set():  # it exited the moment that it was loaded
            raise EchoError(await self._exit_reason())
        self.state = "ready"
        self.note_progress()
        self._listener.on_ready(ready, channel)

    def on_event(self, event: Ready | Failed) -> None:
        if isinstance(event, Failed):
            self._failure = event.message
        elif self._loading is not None and not self._loading.done():
            self._loading.set_result(event)

    async def _fail_loading(self) -> None:
        """The core exited while it loaded."""
        loading, reason = self._loading, await self._exit_reason()
        if loading is not None and not loading.done():
            loading.set_exception(EchoError(reason))

    # ------------------------------------------------------------------------- exits and restarts

    def _on_lost(self, channel: ClientChannel) -> None:
        if channel is not self._channel:
            return  # of a core that was given up before
        self._closed.set()
        if self._loading is not None and not self._loading.done():
            self._spawn(self._fail_loading())
        elif self.state == "ready":
            self.state = "loading"
            self._spawn(self._recover())

    async def _watch_for_stalls(self) -> None:
        """Ends a core that takes no step while it has work."""
        stall = self._config.stall_seconds
        while True:
            await asyncio.sleep(stall / 8)
            silent = time.monotonic() - self._last_progress
            if self.state == "ready" and self._listener.in_flight and silent > stall:
                self._failure = f"no step for {silent:.1f} s while requests were in flight"
                self.state = "loading"
                self._spawn(self._recover())

    async def _recover(self) -> None:
        reason = await self._exit_reason()
        await self._reap(reason)
        while self._may_restart(reason):
            exits = len(self._exits)
            await asyncio.sleep(self._config.backoff * 2.0 ** (exits - 1))
            try:
                await self._launch(self._listener.controller_for(exits))
            except Exception as error:
                reason = explain(error)
                await self._reap(reason)
            else:
                self.restarts += 1
                log.warning("the engine is back")
                return

    def _may_restart(self, reason: str) -> bool:
        """Counts an exit and returns whether the core may be started once more."""
        now, config = time.monotonic(), self._config
        self._exits = [*(t for t in self._exits if now - t < config.restart_window), now]
        log.error("the engine died (%d of %d allowed): %s", len(self._exits), config.most_restarts, reason)
        if self.draining or len(self._exits) > config.most_restarts:
            self.state = "dead"
            log.critical("the engine is not restarted: %s", "shutting down" if self.draining else "it keeps dying")
            return False
        return True

    async def _exit_reason(self) -> str:
        """Returns what the core said last, or how its process ended."""
        if self._failure is None and self.worker is not None:
            await asyncio.to_thread(self.worker.join, 2.0)
        return self._failure or (self.worker.exit_reason if self.worker is not None else "it was never started")

    async def _reap(self, reason: str) -> None:
        channel, worker, self._channel, self.worker = self._channel, self.worker, None, None
        self._listener.on_exit(reason)
        if channel is not None:
            channel.close()
        if worker is not None:
            worker.kill()
            atexit.unregister(worker.kill)
            await asyncio.to_thread(worker.join, 2.0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
