"""Drives a backend and records what happened: in a closed loop (`serve`) or under a workload (`drive`).

Knows nothing about models, prompts or files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from echo_rl.contracts import Backend, Controller, Request, RequestOutput
from echo_rl.errors import ConfigError
from echo_rl.workloads.arrivals import Arrivals
from echo_rl.workloads.records import CUT, RequestRecord, RunRecord, StepRecord


@dataclass
class _InFlight:
    """A request that the engine holds, written by the loop alone."""

    request: Request
    order: int
    arrival: float
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)

    def take(self, output: RequestOutput, now: float) -> None:
        self.tokens.extend(output.tokens)
        self.token_times.extend([now] * len(output.tokens))

    def record(self, now: float, reason: str, error: str | None = None) -> RequestRecord:
        return RequestRecord(
            id=self.request.id,
            prompt_tokens=len(self.request.prompt),
            arrival=self.arrival,
            finish=now,
            tokens=tuple(self.tokens),
            token_times=tuple(self.token_times),
            finish_reason=reason,
            error=error,
        )


def serve(
    engine: Backend,
    controller: Controller,
    requests: Iterable[Request],
    concurrency: int,
    on_output: Callable[[RequestOutput], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> RunRecord:
    """Serves `requests` with `concurrency` of them in flight until all are finished.

    A new request arrives the moment one finishes. `on_output` sees every output of every step, after
    it is recorded. The engine must be idle at the start; whatever ends the run early (an error, an
    interrupt), the requests still in flight are cancelled. Raises `ConfigError` where concurrency is
    below 1 or the engine is busy, and whatever the engine raises (`RequestError` for a bad request).
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency is {concurrency}; give at least 1")
    loop = _Loop(engine, controller, clock, on_output=on_output)
    return loop.run(_GivenRequests(iter(requests), concurrency), concurrency)


def drive(
    backend: Backend,
    controller: Controller,
    arrivals: Arrivals,
    source: Callable[[str], Request],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    idle: Callable[[float], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> RunRecord:
    """Serves a workload, open or closed, until `steps` are taken or `seconds` have passed, whichever is first.

    `source(suite)` gives the next request of a suite ("" = of any), with an id that none in flight has.
    An open arrival is recorded when it came, though a step that was under way made it wait. With
    nothing in flight, ``idle(until)`` lets the clock reach `until`; None sleeps. What is in flight at
    the end is cancelled and recorded as `RequestRecord.cut`. Raises `ConfigError` where no end is given
    or the backend is busy, and whatever the backend and `source` raise.
    """
    ends = [end for end in (steps, seconds) if end is not None]
    if not ends or min(ends) <= 0:
        raise ConfigError(f"a run needs an end: give steps or seconds above 0 (steps {steps}, seconds {seconds})")
    wait = idle or (lambda until: time.sleep(max(0.0, until - clock())))
    loop = _Loop(backend, controller, clock, on_step=on_step)
    return loop.run(_WorkloadRequests(arrivals, source, steps or math.inf, seconds or math.inf, wait))


class _Loop:
    """One run: the requests in flight and their records.

    Its admission decides which requests come: ``ready(loop)`` adds those that are due and is False at the run's end.
    """

    def __init__(
        self,
        engine: Backend,
        controller: Controller,
        clock: Callable[[], float],
        on_output: Callable[[RequestOutput], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        if engine.has_work:
            raise ConfigError("the engine still holds requests of another run; finish or cancel them first")
        self.engine = engine
        self.controller = controller
        self.on_output = on_output
        self.on_step = on_step
        self.clock = clock
        self.start = clock()
        self.admitted = 0
        self.most = 0
        self.in_flight: dict[str, _InFlight] = {}
        self.done: list[tuple[int, RequestRecord]] = []
        self.steps: list[StepRecord] = []

    def run(self, admission: _GivenRequests | _WorkloadRequests, concurrency: int | None = None) -> RunRecord:
        """Serve to the end and return the record; its `concurrency` is the most that were in flight where none is
        given."""
        try:
            while admission.ready(self):
                self._step()
            end = self.now()
        finally:
            for request_id in self.in_flight:
                self.engine.cancel(request_id)
        self.done += [(held.order, held.record(end, CUT)) for held in self.in_flight.values()]
        return RunRecord(
            controller=self.controller.name,
            concurrency=self.most if concurrency is None else concurrency,
            seconds=end,
            requests=tuple(record for _, record in sorted(self.done, key=lambda pair: pair[0])),
            steps=tuple(self.steps),
        )

    def now(self) -> float:
        return self.clock() - self.start

    def add(self, request: Request, arrival: float) -> None:
        self.engine.add(request)
        self.in_flight[request.id] = _InFlight(request, order=self.admitted, arrival=arrival)
        self.admitted += 1
        self.most = max(self.most, len(self.in_flight))

    def _step(self) -> None:
        if not self.engine.has_work:
            raise RuntimeError(f"the engine has no work while {len(self.in_flight)} requests are in flight")
        begin = self.now()
        report = self.engine.step(self.controller)
        now = self.now()
        self.steps.append(StepRecord.of(report, end=now, seconds=now - begin))
        for output in report.outputs:
            self._take(output, now)
        if self.on_step is not None:
            self.on_step(self.steps[-1])

    def _take(self, output: RequestOutput, now: float) -> None:
        held = self.in_flight[output.id]
        held.take(output, now)
        if output.finish_reason is not None:
            del self.in_flight[output.id]
            self.done.append((held.order, held.record(now, output.finish_reason, output.error)))
        if self.on_output is not None:
            self.on_output(output)


class _GivenRequests:
    """The admission of `serve`: these requests, so many at a time, to the last."""

    def __init__(self, requests: Iterator[Request], concurrency: int) -> None:
        self.requests, self.concurrency = requests, concurrency

    def ready(self, loop: _Loop) -> bool:
        while len(loop.in_flight) < self.concurrency:
            request = next(self.requests, None)
            if request is None:
                break
            loop.add(request, loop.now())
        return bool(loop.in_flight)


class _WorkloadRequests:
    """The admission of `drive`: requests as they arrive, to the end of the time."""

    def __init__(
        self,
        arrivals: Arrivals,
        source: Callable[[str], Request],
        steps: float,
        seconds: float,
        wait: Callable[[float], None],
    ) -> None:
        self.arrivals, self.source, self.steps, self.seconds, self.wait = arrivals, source, steps, seconds, wait
        self.seen = 0.0  # all arrivals up to here are added
        self.reached = 0.0  # waited until here: the clock may show less by a rounding error

    def ready(self, loop: _Loop) -> bool:
        while len(loop.steps) < self.steps and self._now(loop) < self.seconds:
            self._admit(loop)
            if loop.in_flight:
                return True
            self._idle(loop)
        return False

    def _now(self, loop: _Loop) -> float:
        return max(loop.now(), self.reached)

    def _admit(self, loop: _Loop) -> None:
        now = self._now(loop)
        for arrival, suite in self.arrivals.since(self.seen, now, len(loop.in_flight)):
            loop.add(self.source(suite), arrival)
        self.seen = now

    def _idle(self, loop: _Loop) -> None:
        upcoming = self.arrivals.next_time(self.seen)
        if upcoming is None:
            raise RuntimeError("the workload brings no request and none is in flight")
        self.reached = min(upcoming, self.seconds)
        self.wait(loop.start + self.reached)
