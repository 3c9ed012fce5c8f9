"""The engine's loop: handle commands, take a step, send what it brought. Knows no HTTP and no transport."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from echo_rl.contracts import Backend, Request, StepReport
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import EchoError, PlanViolation, RequestError
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.core.controller_manager import ControllerManager, MakeController
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
    TraceTrees,
)
from echo_rl.workloads.records import StepRecord

Receive = Callable[[float | None], Sequence[Command]]
"""Returns the commands that are there; waits up to so many seconds for the first, with None for ever."""
Send = Callable[[Event], None]

BUILDING_SECONDS = 0.01
"""Seconds between an idle core's checks whether a new controller is built."""
MOST_VIOLATIONS = 3
"""Steps in a row that end by a `PlanViolation` after which the core gives up."""
log = logging.getLogger(__name__)


class ServedEngine(Backend, Protocol):
    """An engine that a server can run: `runtime.engine.Engine` is one."""

    trace_trees: bool
    """Step reports carry the verified trees where this is true."""

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if KV blocks are not conserved."""
        ...


@dataclass(frozen=True)
class CoreOptions:
    limits: Limits = field(default_factory=Limits)
    profile: CostProfile | None = None
    """The costs that K_max follows from; without them steps report 0."""
    switch: ControllerManagerOptions = field(default_factory=ControllerManagerOptions)
    serving_counts: Callable[[], dict[str, int]] = dict
    """Counts the engine's steps so far by how they were served."""


class EngineCore:
    """Owns the engine and its controllers. One thread runs it, from `run` to its return."""

    def __init__(self, engine: ServedEngine, make_controller: MakeController, spec: str, options: CoreOptions) -> None:
        """Raises `ConfigError` where the controller `spec` is not usable."""
        self._engine = engine
        self._manager = ControllerManager(make_controller, spec, options.limits, options.switch)
        self._knee, self._serving_counts = _knee_by(options.profile), options.serving_counts
        self._in_flight: set[str] = set()
        self._violations = 0
        self._steps = 0

    def run(self, receive: Receive, send: Send) -> None:
        """Serves until `Stop`, then cancels what is in flight. Raises what the engine raises, which ends the core."""
        try:
            while True:
                for command in receive(self._receive_timeout()):
                    if isinstance(command, Stop):
                        self._cancel_all()
                        return
                    self._handle(command, send)
                for event in self._manager.poll():
                    send(event)
                if self._engine.has_work:
                    self._step(send)
        finally:
            self._manager.close()

    def _receive_timeout(self) -> float | None:
        if self._engine.has_work:
            return 0.0
        return BUILDING_SECONDS if self._manager.building else None

    # ------------------------------------------------------------------------- commands

    def _handle(self, command: Command, send: Send) -> None:
        match command:
            case Submit(request):
                self._add(request, send)
            case Cancel(request_id):
                self._cancel(request_id)
            case TraceTrees(enabled):
                self._engine.trace_trees = enabled
            case Inspect(ticket):
                send(self._inspect(ticket))
            case Stop():
                raise AssertionError("run() handles it")
            case _:
                for event in self._manager.handle(command):
                    send(event)

    def _add(self, request: Request, send: Send) -> None:
        try:
            if request.id in self._in_flight:
                raise RequestError(f"request id '{request.id}' is in use; give every request its own")
            self._engine.add(request)
            self._in_flight.add(request.id)
        except RequestError as error:
            send(Refused(request.id, str(error)))
        except Exception:  # the requests in flight are untouched
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
        return Reply(ticket, {**held, **self._manager.describe()})

    # ------------------------------------------------------------------------- steps

    def _step(self, send: Send) -> None:
        active, running = self._manager.active, len(self._in_flight)
        began = time.perf_counter()
        try:
            report = self._engine.step(active.guard)
        except PlanViolation as error:
            self._retire_active(error)
            return
        seconds = time.perf_counter() - began
        self._steps, self._violations = self._steps + 1, 0
        self._in_flight.difference_update(output.id for output in report.outputs if output.finish_reason)
        tokens = sum(len(output.tokens) for output in report.outputs)
        events = self._manager.on_step(tokens, seconds, running - report.load.waiting, report.load.batch_size > 0)
        spec = active.spec if self._manager.is_active(active) else self._manager.active.spec
        send(Stepped(report.outputs, self._stats(report, spec, running, tokens, seconds)))
        for event in events:
            send(event)

    def _retire_active(self, error: PlanViolation) -> None:
        """Retires a controller whose decision passed its guard: nothing is committed, so the fallback can go on."""
        self._violations += 1
        if self._violations >= MOST_VIOLATIONS:
            raise error
        log.error("a decision passed the guard that the engine refuses: %s", error)
        self._manager.active.guard.retire("invalid", str(error))

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
            fallbacks=self._manager.fallbacks,
            rollbacks=self._manager.rollbacks,
            serving=self._serving_counts(),
            trees=report.trees,
        )


def _knee_by(profile: CostProfile | None) -> Callable[[int, float], int]:
    """Returns a function to K_max at a batch size and context, which is 0 without a profile or a batch."""

    @cache
    def at_octave(batch: int, octave: int) -> int:
        return profile.knee(batch, 2.0**octave - 1.0) if profile is not None and batch else 0

    return lambda batch, context: at_octave(batch, round(math.log2(context + 1.0)))
