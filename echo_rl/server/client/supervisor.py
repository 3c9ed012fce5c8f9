"""One engine core after another: starts it, hears of its death, starts the next. Knows nothing of requests.

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
from echo_rl.server.core.options import ControllerManagerOptions
from echo_rl.server.core.worker import Factory, ProcessWorker, ThreadWorker, Worker
from echo_rl.server.ipc import FrontChannel
from echo_rl.server.messages import Event, Failed, Ready, Stop

WORKERS: dict[str, Callable[..., Worker]] = {"process": ProcessWorker, "thread": ThreadWorker}
log = logging.getLogger(__name__)


class Unavailable(EchoError, RuntimeError):
    """The engine serves nothing now: it is loading, restarting, shutting down or dead."""


@dataclass(frozen=True)
class SupervisorConfig:
    controller: str = "echo"
    """Decides from the start, as on the command line."""
    isolation: Literal["process", "thread"] = "process"
    """Where the engine runs: a crash or a hang in a thread can't be ended, so ``thread`` is for tests and embedding."""
    stall_seconds: float = 60.0
    """The engine counts as hung when no step ends for so long while work is in flight."""
    start_seconds: float = 1800.0
    """Seconds that loading may take (the first start compiles kernels and fetches weights)."""
    command_seconds: float = 150.0
    """Seconds that an answer of the core may take."""
    stop_seconds: float = 10.0
    """Seconds that the core has to end when told to."""
    most_restarts: int = 5
    """Deaths within `restart_window` after which the host gives up."""
    restart_window: float = 600.0
    """Seconds."""
    backoff: float = 0.5
    """Seconds before the first restart; doubles with every further death within the window."""
    switch: ControllerManagerOptions = field(default_factory=ControllerManagerOptions)

    def __post_init__(self) -> None:
        if self.isolation not in WORKERS:
            raise ConfigError(f"isolation is '{self.isolation}'; give one of {', '.join(WORKERS)}")


class Owner(Protocol):
    """What a `EngineSupervisor` asks of whom it serves, and tells it."""

    @property
    def busy(self) -> bool:
        """Whether the core has work, so that its silence means something."""
        ...

    def controller_for(self, deaths: int) -> str:
        """Who decides in the next core, after so many deaths in a row."""
        ...

    def on_event(self, event: Event) -> None:
        """Everything that a core says, but for its birth and its death."""
        ...

    def on_ready(self, ready: Ready) -> None:
        """A core is loaded."""
        ...

    def on_death(self, why: str) -> None:
        """The core is gone, with all that it held."""
        ...


class EngineSupervisor:
    """The core of the moment. `state`: ``new``, ``loading`` (again), ``ready``, ``dead`` (given up), ``stopped``."""

    def __init__(self, config: SupervisorConfig, factory: Factory, owner: Owner) -> None:
        self._config, self._factory, self._owner = config, factory, owner
        self.channel: FrontChannel | None = None
        self.worker: Worker | None = None
        self.state: Literal["new", "loading", "ready", "dead", "stopped"] = "new"
        self.restarts = 0
        self.retiring = False
        """Set where a death is the end: nobody needs another core."""
        self._loading: asyncio.Future[Ready] | None = None
        self._gone = asyncio.Event()  # the core's stream has ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_words: str | None = None
        self._deaths: list[float] = []
        self._heard = 0.0

    async def start(self, controller: str) -> None:
        """Raises `EchoError` with what was wrong; nothing runs then."""
        self._spawn(self._watch_for_stalls())
        try:
            await self._launch(controller)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends the core, for good."""
        was_ready, self.state = self.state == "ready", "stopped"
        for task in self._tasks:
            task.cancel()
        if was_ready:
            self.send(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), self._config.stop_seconds)
        await self._bury("the server stopped")

    def send(self, command: Any) -> None:
        """Dropped where there is no core."""
        if self.channel is not None:
            self.channel.send(command)

    def note_progress(self) -> None:
        """The core did something, or was given its first work."""
        self._heard = time.monotonic()

    # ------------------------------------------------------------------------- birth

    async def _launch(self, controller: str) -> None:
        config = self._config
        self.state, self._last_words, self._gone = "loading", None, asyncio.Event()
        self._loading = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        try:
            self.worker = WORKERS[config.isolation](theirs, self._factory, controller, config.switch)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        atexit.register(self.worker.kill)  # before multiprocessing would wait for it
        channel = self.channel = FrontChannel(self._on_event, lambda: self._on_lost(channel))
        await channel.open(ours)
        try:
            ready = await asyncio.wait_for(self._loading, config.start_seconds)
        except TimeoutError:
            raise Unavailable(f"the engine was not loaded within {config.start_seconds:g} s") from None
        if self._gone.is_set():  # it died the moment that it was loaded
            raise EchoError(await self._cause())
        self.state = "ready"
        self.note_progress()
        self._owner.on_ready(ready)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Ready):
            if self._loading is not None and not self._loading.done():
                self._loading.set_result(event)
        elif isinstance(event, Failed):
            self._last_words = event.message
        else:
            self._owner.on_event(event)

    async def _tell_why_not(self) -> None:
        """The core ended while it loaded."""
        loading, why = self._loading, await self._cause()
        if loading is not None and not loading.done():
            loading.set_exception(EchoError(why))

    # ------------------------------------------------------------------------- death

    def _on_lost(self, channel: FrontChannel) -> None:
        if channel is not self.channel:
            return  # one that was given up before
        self._gone.set()
        if self._loading is not None and not self._loading.done():
            self._spawn(self._tell_why_not())
        elif self.state == "ready":
            self.state = "loading"
            self._spawn(self._recover())

    async def _watch_for_stalls(self) -> None:
        """A core that takes no step while it has work hangs: its end is hastened."""
        stall = self._config.stall_seconds
        while True:
            await asyncio.sleep(stall / 8)
            silent = time.monotonic() - self._heard
            if self.state == "ready" and self._owner.busy and silent > stall:
                self._last_words = f"no step for {silent:.1f} s while requests were in flight"
                self.state = "loading"
                self._spawn(self._recover())

    async def _recover(self) -> None:
        why = await self._cause()
        await self._bury(why)
        while self._may_restart(why):
            deaths = len(self._deaths)
            await asyncio.sleep(self._config.backoff * 2.0 ** (deaths - 1))
            try:
                await self._launch(self._owner.controller_for(deaths))
            except Exception as error:
                why = explain(error)
                await self._bury(why)
            else:
                self.restarts += 1
                log.warning("the engine is back")
                return

    def _may_restart(self, why: str) -> bool:
        """Notes a death; whether there was not one too many."""
        now, config = time.monotonic(), self._config
        self._deaths = [*(t for t in self._deaths if now - t < config.restart_window), now]
        log.error("the engine died (%d of %d allowed): %s", len(self._deaths), config.most_restarts, why)
        if self.retiring or len(self._deaths) > config.most_restarts:
            self.state = "dead"
            log.critical("the engine is not restarted: %s", "shutting down" if self.retiring else "it keeps dying")
            return False
        return True

    async def _cause(self) -> str:
        """What the core said last, or how it ended."""
        if self._last_words is None and self.worker is not None:
            await asyncio.to_thread(self.worker.join, 2.0)
        return self._last_words or (self.worker.epitaph if self.worker is not None else "it was never started")

    async def _bury(self, why: str) -> None:
        channel, worker, self.channel, self.worker = self.channel, self.worker, None, None
        self._owner.on_death(why)
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
