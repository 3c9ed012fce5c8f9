"""Runs an engine core in a process of its own, or in a thread of its client's.

Loads the engine there, then runs the core over a channel. The client imports this without loading torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller
from echo_rl.errors import EchoError, explain
from echo_rl.server import logs
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.ipc import CoreChannel
from echo_rl.server.messages import Failed, Ready, Stop
from echo_rl.server.process import freeze_gc_heap, use_default_scheduling

if TYPE_CHECKING:
    from echo_rl.runtime.engine import Engine
    from echo_rl.server.core.controller_manager import MakeController
    from echo_rl.server.core.engine_core import CoreOptions, ServedEngine

ORPHAN_SECONDS = 3.0
"""Seconds that a process whose parent is gone has to end by itself."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """A loaded engine and what serving it needs."""

    engine: ServedEngine
    make_controller: MakeController
    max_context: int
    vocab: int
    options: CoreOptions
    environment: dict[str, str] = field(default_factory=dict)


Factory = Callable[[ControllerManagerOptions], LoadedEngine]
"""Loads the engine where it will run. For a process it must be picklable: a module's function, or a partial of one."""


def load_live_engine(
    load: Callable[[EngineConfig], tuple[Engine, dict[str, str]]],
    config: EngineConfig,
    switch: ControllerManagerOptions,
) -> LoadedEngine:
    """Loads a live engine with the controllers of the registry.

    ``partial(load_live_engine, load_engine, config)`` is a `Factory`. Raises what `load` raises, and `ConfigError`
    where the machine's cost profile is not readable.
    """
    from echo_rl.costs.profile import CostProfile
    from echo_rl.server.core.engine_core import CoreOptions
    from echo_rl.server.guard.validation import Limits

    engine, environment = load(config)
    arch = engine.runner.target.arch
    limits = Limits(config.max_expanded, drafter=engine.has_drafter)
    return LoadedEngine(
        engine,
        build_controller,
        max_context=min(config.max_context, arch.max_positions),
        vocab=arch.vocab,
        options=CoreOptions(limits, CostProfile.default(), switch, partial(serving_counts, engine)),
        environment=environment,
    )


def with_logging(log_format: str, factory: Factory, switch: ControllerManagerOptions) -> LoadedEngine:
    """Calls `factory` in a process of its own, after setting up that process's log; see `logs.configure`."""
    logs.configure(log_format)
    return factory(switch)


def serving_counts(engine: Engine) -> dict[str, int]:
    """Counts steps by how they were served.

    ``device`` counts those that the device served by itself, ``eager:CAUSE`` those left to the host, and
    ``graphs:EVENT`` what became of the device's graphs. Empty for an engine that serves every step on the host.
    """
    from echo_rl.runtime.step.device.step import DeviceStep

    serving = engine.serving
    if not isinstance(serving, DeviceStep):
        return {}
    eager = {f"eager:{cause}": count for cause, count in serving.counts.eager.items()}
    graphs = {f"graphs:{event}": count for event, count in vars(serving.graphs.counts).items()}
    return {"device": serving.counts.device, **eager, **graphs}


def build_controller(spec: str) -> Controller:
    """Returns a controller of the registry, given as on the command line. Raises `ConfigError`."""
    from echo_rl.controllers import registry
    from echo_rl.controllers.arm import Arm

    arm = Arm.parse(spec)
    return registry.make(arm.controller, **arm.options)


class ProcessWorker:
    """A spawned process; a crash, a hang or a leak of the engine ends with it."""

    def __init__(self, sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_run_process, args=(sock, factory, spec, switch), name="engine")
        self._process.daemon = True
        self._process.start()
        sock.close()  # the child has its own

    def kill(self) -> None:
        """Ends it at once; returns immediately."""
        self._process.kill()

    def join(self, seconds: float) -> None:
        """Waits up to so many seconds for its end."""
        self._process.join(seconds)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def exit_reason(self) -> str:
        """Returns how it ended, for where it sent no `Failed`."""
        code = self._process.exitcode
        if code is None:
            return "the engine process closed its connection"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process ended with exit code {code}"


class ThreadWorker:
    """A thread of this process; one that hangs is abandoned."""

    exit_reason = "the engine thread ended"

    def __init__(self, sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
        self._thread = threading.Thread(target=run_core, args=(sock, factory, spec, switch), name="engine", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Does nothing: the core finds its channel closed after the step under way."""

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


Worker = ProcessWorker | ThreadWorker


def run_core(
    sock: socket.socket,
    factory: Factory,
    spec: str,
    switch: ControllerManagerOptions,
    on_lost: Callable[[], None] | None = None,
) -> bool:
    """Loads the engine, sends `Ready` and runs the core to its end.

    Returns False where it failed; the last event is `Failed` then.
    """
    channel = CoreChannel(sock, last_command=Stop(), on_lost=on_lost)
    try:
        from echo_rl.server.core.engine_core import EngineCore

        loaded = factory(switch)
        core = EngineCore(loaded.engine, loaded.make_controller, spec, loaded.options)
        channel.send(Ready(spec, loaded.max_context, loaded.vocab, loaded.environment))
        core.run(channel.receive, channel.send)
    except (BrokenPipeError, ConnectionResetError):
        return True  # the client is gone: nobody to tell
    except BaseException as error:
        _send_failure(channel, error)
        return False
    finally:
        channel.close()
    return True


def _send_failure(channel: CoreChannel, error: BaseException) -> None:
    expected = isinstance(error, EchoError)
    log.log(logging.WARNING if expected else logging.ERROR, "the engine ends: %s", error, exc_info=not expected)
    try:
        channel.send(Failed(explain(error)))
    except OSError:
        log.warning("the client is gone, too")


def _run_process(sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
    """Runs a core as a process. Signals that end a server go to its whole group; the client alone stops the engine."""
    use_default_scheduling()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ok = run_core(sock, partial(_with_frozen_heap, factory), spec, switch, on_lost=_exit_soon)
    logging.shutdown()
    os._exit(0 if ok else 1)  # threads that hang (a controller's) must not keep the process


def _with_frozen_heap(factory: Factory, switch: ControllerManagerOptions) -> LoadedEngine:
    loaded = factory(switch)
    freeze_gc_heap()
    return loaded


def _exit_soon() -> None:
    """The parent is gone: the process ends after the step under way, and in any case after `ORPHAN_SECONDS`."""
    timer = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
