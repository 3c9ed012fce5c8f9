"""Where a core lives: in a process of its own, or in a thread of the front's.

Loads the engine there, then runs the core over a channel. The front imports this without loading torch.
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
from typing import TYPE_CHECKING, Protocol

from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller
from echo_rl.errors import EchoError, explain
from echo_rl.server.api import logs
from echo_rl.server.core.heap import settle
from echo_rl.server.core.options import ControllerManagerOptions
from echo_rl.server.core.turns import take_turns
from echo_rl.server.ipc import CoreChannel
from echo_rl.server.messages import Failed, Ready, Stop

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
    options: CoreOptions | None = None
    environment: dict[str, str] = field(default_factory=dict)


Factory = Callable[[ControllerManagerOptions], LoadedEngine]
"""Loads the engine where it will run. For a process it must be picklable: a module's function, or a partial of one."""


def live(
    load: Callable[[EngineConfig], tuple[Engine, dict[str, str]]],
    config: EngineConfig,
    switch: ControllerManagerOptions,
) -> LoadedEngine:
    """A live engine with the controllers of the registry.

    ``partial(live, load_engine, config)`` is a `Factory`. Raises what `load` raises, and `ConfigError` where the
    machine's cost profile is not readable.
    """
    from echo_rl.costs.profile import CostProfile
    from echo_rl.server.core.engine_core import CoreOptions
    from echo_rl.server.guard.validation import Limits

    engine, environment = load(config)
    arch = engine.runner.target.arch
    limits = Limits(config.max_expanded, drafter=engine.runner.drafter is not None)
    return LoadedEngine(
        engine,
        build_controller,
        max_context=min(config.max_context, arch.max_positions),
        vocab=arch.vocab,
        options=CoreOptions(limits, CostProfile.default(), switch, partial(ways_of, engine)),
        environment=environment,
    )


def logging_as(form: str, factory: Factory, switch: ControllerManagerOptions) -> LoadedEngine:
    """What `factory` loads, in a process of its own, whose log has this form from now on; see `logs.configure`."""
    logs.configure(form)
    return factory(switch)


def ways_of(engine: Engine) -> dict[str, int]:
    """Steps that the device served by itself (``device``) and that were left to the host, by cause (``eager:CAUSE``),
    and what became of their bodies (``graphs:replayed``, ...); empty for an engine that serves all on the host."""
    from echo_rl.runtime.step.device.step import DeviceStep

    serving = engine.serving
    if not isinstance(serving, DeviceStep):
        return {}
    eager = {f"eager:{cause}": count for cause, count in serving.counts.eager.items()}
    graphs = {f"graphs:{what}": count for what, count in vars(serving.graphs.counts).items()}
    return {"device": serving.counts.device, **eager, **graphs}


def build_controller(spec: str) -> Controller:
    """A controller of the registry, as on the command line. Raises `ConfigError`."""
    from echo_rl.controllers import registry
    from echo_rl.controllers.arm import Arm

    arm = Arm.parse(spec)
    return registry.make(arm.controller, **arm.options)


class Worker(Protocol):
    """A core that is running somewhere."""

    def kill(self) -> None:
        """End it at once, as far as that is possible; returns immediately."""
        ...

    def join(self, seconds: float) -> None:
        """Waits for its end."""
        ...

    @property
    def epitaph(self) -> str:
        """What is known of its end when it said nothing itself."""
        ...


class ProcessWorker:
    """A spawned process; a crash, a hang or a leak of the engine ends with it."""

    def __init__(self, sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_run_process, args=(sock, factory, spec, switch), name="engine")
        self._process.daemon = True
        self._process.start()
        sock.close()  # the child has its own

    def kill(self) -> None:
        self._process.kill()

    def join(self, seconds: float) -> None:
        self._process.join(seconds)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def epitaph(self) -> str:
        code = self._process.exitcode
        if code is None:
            return "the engine process closed its connection"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process ended with exit code {code}"


class ThreadWorker:
    """A thread of this process; one that hangs is abandoned."""

    def __init__(self, sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
        self._sock = sock
        self._thread = threading.Thread(
            target=serve_core, args=(sock, factory, spec, switch), name="engine", daemon=True
        )
        self._thread.start()

    def kill(self) -> None:
        """The core finds its channel closed after the step under way."""

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    @property
    def epitaph(self) -> str:
        return "the engine thread ended"


def serve_core(
    sock: socket.socket,
    factory: Factory,
    spec: str,
    switch: ControllerManagerOptions,
    on_orphaned: Callable[[], None] | None = None,
) -> bool:
    """Loads, says `Ready`, runs the core to its end. False where it failed: the last event is `Failed` then."""
    channel = CoreChannel(sock, farewell=Stop(), on_lost=on_orphaned)
    try:
        from echo_rl.server.core.engine_core import EngineCore

        served = factory(switch)
        core = EngineCore(served.engine, served.make_controller, spec, served.options)
        channel.send(Ready(spec, served.max_context, served.vocab, served.environment))
        core.run(channel.receive, channel.send)
    except (BrokenPipeError, ConnectionResetError):
        return True  # the front is gone: nobody to tell
    except BaseException as error:
        _tell(channel, error)
        return False
    finally:
        channel.close()
    return True


def _tell(channel: CoreChannel, error: BaseException) -> None:
    expected = isinstance(error, EchoError)
    log.log(logging.WARNING if expected else logging.ERROR, "the engine ends: %s", error, exc_info=not expected)
    try:
        channel.send(Failed(explain(error)))
    except OSError:
        log.warning("the front is gone, too")


def _run_process(sock: socket.socket, factory: Factory, spec: str, switch: ControllerManagerOptions) -> None:
    """Signals that end a server go to the whole group; the front alone decides when the engine stops."""
    take_turns()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ok = serve_core(sock, partial(_settled, factory), spec, switch, on_orphaned=_die_later)
    logging.shutdown()
    os._exit(0 if ok else 1)  # threads that hang (a controller's) must not keep the process


def _settled(factory: Factory, switch: ControllerManagerOptions) -> LoadedEngine:
    served = factory(switch)
    settle()
    return served


def _die_later() -> None:
    """The parent is gone: end after the step under way, and at all costs."""
    timer = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
