"""The engine's loop: obey what has come, take a step, tell what it did. Knows no HTTP and no transport."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from echo_rl.contracts import Backend, Request, StepReport
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import EchoError, PlanViolation, RequestError
from echo_rl.server.core.controller_manager import ControllerManager, MakeController
from echo_rl.server.core.options import ControllerManagerOptions
from echo_rl.server.guard.validation import Limits
from echo_rl.server.messages import (
    Cancel,
    Command,
    Event,
    Inspect,
    Refused,
    Reply,
    Stepped,
    StepStats,
    Stop,
    Submit,
    Watch,
)
from echo_rl.workloads.records import StepRecord

Receive = Callable[[float | None], Sequence[Command]]
"""The commands that are there; with a timeout waits so many seconds for the first, with None for ever."""
Send = Callable[[Event], None]

BUILDING_SECONDS = 0.01
"""How often an idle core looks whether a new controller is built."""
MOST_VIOLATIONS = 3
"""Steps in a row that a `PlanViolation` may end before the core gives up."""
log = logging.getLogger(__name__)


class ServedEngine(Backend, Protocol):
    """An engine that a server can run: `runtime.engine.Engine` is one."""

    trace_trees: bool

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if KV blocks are not conserved."""
        ...


@dataclass(frozen=True)
class CoreOptions:
    limits: Limits = field(default_factory=Limits)
    profile: CostProfile | None = None
    """Tells K_max; without it steps report 0."""
    switch: ControllerManagerOptions = field(default_factory=ControllerManagerOptions)
    ways: Callable[[], dict[str, int]] = dict
    """How the engine has served its steps so far, counted by way."""


class EngineCore:
    """Owns the engine and whoever decides. One thread runs it, from `run` to its return."""

    def __init__(
        self, engine: ServedEngine, make_controller: MakeController, spec: str, options: CoreOptions | None = None
    ) -> None:
        """Raises `ConfigError` where the controller `spec` is not usable."""
        options = options or CoreOptions()
        self._engine = engine
        self._switch = ControllerManager(make_controller, spec, options.limits, options.switch)
        self._knee, self._ways = _Knees(options.profile), options.ways
        self._in_flight: set[str] = set()
        self._violations = 0
        self._steps = 0

    def run(self, receive: Receive, send: Send) -> None:
        """Serves until `Stop`, then cancels what is in flight. Raises what the engine raises: it is dead then."""
        try:
            while True:
                for command in receive(self._patience()):
                    if isinstance(command, Stop):
                        self._cancel_all()
                        return
                    self._obey(command, send)
                for event in self._switch.poll():
                    send(event)
                if self._engine.has_work:
                    self._step(send)
        finally:
            self._switch.close()

    def _patience(self) -> float | None:
        if self._engine.has_work:
            return 0.0
        return BUILDING_SECONDS if self._switch.building else None

    # ------------------------------------------------------------------------- commands

    def _obey(self, command: Command, send: Send) -> None:
        match command:
            case Submit(request):
                self._add(request, send)
            case Cancel(request_id):
                self._cancel(request_id)
            case Watch(trees):
                self._engine.trace_trees = trees
            case Inspect(ticket):
                send(self._inspect(ticket))
            case Stop():
                raise AssertionError("run() handles it")
            case _:
                for event in self._switch.obey(command):
                    send(event)

    def _add(self, request: Request, send: Send) -> None:
        try:
            if request.id in self._in_flight:
                raise RequestError(f"request id '{request.id}' is in use; give every request its own")
            self._engine.add(request)
            self._in_flight.add(request.id)
        except RequestError as error:
            send(Refused(request.id, str(error)))
        except Exception:  # nothing of the others is touched yet
            log.exception("the engine cannot take a request")
            send(Refused(request.id, "the engine cannot take this request; the server's log says why", unforeseen=True))

    def _cancel(self, request_id: str) -> None:
        if request_id in self._in_flight:
            self._in_flight.remove(request_id)
            self._engine.cancel(request_id)

    def _cancel_all(self) -> None:
        for request_id in tuple(self._in_flight):
            self._cancel(request_id)

    def _inspect(self, ticket: int) -> Reply:
        try:
            self._engine.check_integrity()
            kv = "conserved"
        except EchoError as error:
            kv = str(error)
        held = {"in_flight": len(self._in_flight), "steps": self._steps, "kv": kv}
        return Reply(ticket, {**held, **self._switch.describe()})

    # ------------------------------------------------------------------------- steps

    def _step(self, send: Send) -> None:
        seat, running = self._switch.seat, len(self._in_flight)
        began = time.perf_counter()
        try:
            report = self._engine.step(seat.guard)
        except PlanViolation as error:
            self._survive(error)
            return
        seconds = time.perf_counter() - began
        self._steps, self._violations = self._steps + 1, 0
        self._in_flight.difference_update(output.id for output in report.outputs if output.finish_reason)
        tokens = sum(len(output.tokens) for output in report.outputs)
        events = self._switch.stepped(tokens, seconds, running - report.load.waiting, report.load.batch_size > 0)
        spec = seat.spec if self._switch.holds(seat) else self._switch.seat.spec
        send(Stepped(report.outputs, self._stats(report, spec, running, tokens, seconds)))
        for event in events:
            send(event)

    def _survive(self, error: PlanViolation) -> None:
        """A decision that the guard should have caught: nothing is committed yet, so the next step can be another's."""
        self._violations += 1
        if self._violations >= MOST_VIOLATIONS:
            raise error
        log.error("a decision passed the guard that the engine refuses: %s", error)
        self._switch.seat.guard.retire("invalid", str(error))

    def _stats(self, report: StepReport, spec: str, in_flight: int, tokens: int, seconds: float) -> StepStats:
        load = report.load
        return StepStats(
            StepRecord.of(report, end=time.time(), seconds=seconds),
            controller=spec,
            plain=load.plain,
            running=in_flight - load.waiting,
            tokens=tokens,
            kv_used=load.kv_used,
            knee=self._knee(load.batch_size, load.mean_context),
            fallbacks=self._switch.fallbacks,
            rollbacks=self._switch.rollbacks,
            serving=self._ways(),
            trees=report.trees,
        )


class _Knees:
    """K_max by batch size and octave of context, computed once each; 0 without a profile or a batch."""

    def __init__(self, profile: CostProfile | None) -> None:
        self._profile = profile
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, batch: int, context: float) -> int:
        if self._profile is None or not batch:
            return 0
        octave = round(math.log2(context + 1.0))
        if (batch, octave) not in self._known:
            self._known[batch, octave] = self._profile.knee(batch, 2.0**octave - 1.0)
        return self._known[batch, octave]
