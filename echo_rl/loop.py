"""Drives a backend in a closed loop at fixed concurrency and records what happened.

Knows nothing about models, prompts or files. All times in the records are seconds since the run began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

from echo_rl.contracts import Backend, Controller, PhaseTimes, Request, RequestOutput, StepReport
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class RequestRecord:
    """One finished request. `token_times[i]` is when `tokens[i]` reached the caller."""

    id: str
    prompt_tokens: int
    arrival: float
    finish: float
    tokens: tuple[int, ...]
    token_times: tuple[float, ...]
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class StepRecord:
    """The scalars of one `StepReport`, its wall time included."""

    end: float
    seconds: float
    batch_size: int
    prefill_tokens: int
    waiting: int
    context: float
    budget: int
    depth: int
    width: int
    drafted: int
    verified: int
    accepted: int
    committed: int
    reached_by_depth: tuple[int, ...]
    accepted_by_depth: tuple[int, ...]
    times: PhaseTimes

    @classmethod
    def of(cls, report: StepReport, end: float, seconds: float) -> StepRecord:
        """`end` is the time since the run began, `seconds` the step's wall time."""
        return cls(
            end=end,
            seconds=seconds,
            batch_size=report.load.batch_size,
            prefill_tokens=report.load.prefill_tokens,
            waiting=report.load.waiting,
            context=report.load.mean_context,
            budget=report.plan.budget,
            depth=report.plan.max_depth if report.plan.speculates else 0,
            width=report.plan.width if report.plan.speculates else 0,
            drafted=report.drafted,
            verified=report.verified,
            accepted=report.accepted,
            committed=report.committed,
            reached_by_depth=report.reached_by_depth,
            accepted_by_depth=report.accepted_by_depth,
            times=report.times,
        )


@dataclass(frozen=True)
class RunRecord:
    """One closed-loop run: its requests in the order given, its steps in the order taken."""

    controller: str
    concurrency: int
    seconds: float
    requests: tuple[RequestRecord, ...]
    steps: tuple[StepRecord, ...]

    @property
    def output_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, a step as one row; times are rounded to the microsecond."""
        return _rounded({**asdict(self), "steps": [_row(step) for step in self.steps]})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunRecord:
        """The inverse of `to_json`."""
        requests = (
            {**row, "tokens": tuple(row["tokens"]), "token_times": tuple(row["token_times"])}
            for row in data["requests"]
        )
        return cls(
            controller=data["controller"],
            concurrency=data["concurrency"],
            seconds=data["seconds"],
            requests=tuple(RequestRecord(**row) for row in requests),
            steps=tuple(_step(row) for row in data["steps"]),
        )


def pool(records: Sequence[RunRecord]) -> RunRecord:
    """Runs of one controller at one concurrency as if they were one; `seconds` is their sum."""
    if not records:
        raise ConfigError("there are no runs to pool")
    return RunRecord(
        controller=records[0].controller,
        concurrency=records[0].concurrency,
        seconds=sum(record.seconds for record in records),
        requests=tuple(request for record in records for request in record.requests),
        steps=tuple(step for record in records for step in record.steps),
    )


def _row(step: StepRecord) -> list[Any]:
    """The fields in order, phase times as a list."""
    return [astuple(step.times) if item.name == "times" else getattr(step, item.name) for item in fields(step)]


def _step(row: Sequence[Any]) -> StepRecord:
    values = dict(zip((item.name for item in fields(StepRecord)), row, strict=True))
    values["times"] = PhaseTimes(*values["times"])
    for name in ("reached_by_depth", "accepted_by_depth"):
        values[name] = tuple(values[name])
    return StepRecord(**values)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


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

    def finished(self, output: RequestOutput, now: float) -> RequestRecord:
        return RequestRecord(
            id=self.request.id,
            prompt_tokens=len(self.request.prompt),
            arrival=self.arrival,
            finish=now,
            tokens=tuple(self.tokens),
            token_times=tuple(self.token_times),
            finish_reason=output.finish_reason or "error",
            error=output.error,
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
    if engine.has_work:
        raise ConfigError("the engine still holds requests of another run; finish or cancel them first")
    return _ClosedLoop(engine, controller, iter(requests), concurrency, on_output, clock).run()


class _ClosedLoop:
    """The state of one `serve` call."""

    def __init__(
        self,
        engine: Backend,
        controller: Controller,
        arrivals: Iterator[Request],
        concurrency: int,
        on_output: Callable[[RequestOutput], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.engine = engine
        self.controller = controller
        self.arrivals = arrivals
        self.concurrency = concurrency
        self.on_output = on_output
        self.clock = clock
        self.start = clock()
        self.admitted = 0
        self.in_flight: dict[str, _InFlight] = {}
        self.done: list[tuple[int, RequestRecord]] = []
        self.steps: list[StepRecord] = []

    def run(self) -> RunRecord:
        try:
            self._admit()
            while self.in_flight:
                self._step()
                self._admit()
        finally:
            for request_id in self.in_flight:  # empty unless the run ends early
                self.engine.cancel(request_id)
        return RunRecord(
            controller=self.controller.name,
            concurrency=self.concurrency,
            seconds=self._now(),
            requests=tuple(record for _, record in sorted(self.done, key=lambda pair: pair[0])),
            steps=tuple(self.steps),
        )

    def _now(self) -> float:
        return self.clock() - self.start

    def _admit(self) -> None:
        while len(self.in_flight) < self.concurrency:
            request = next(self.arrivals, None)
            if request is None:
                return
            self.engine.add(request)
            self.in_flight[request.id] = _InFlight(request, order=self.admitted, arrival=self._now())
            self.admitted += 1

    def _step(self) -> None:
        if not self.engine.has_work:
            raise RuntimeError(f"the engine has no work while {len(self.in_flight)} requests are in flight")
        begin = self._now()
        report = self.engine.step(self.controller)
        now = self._now()
        self.steps.append(StepRecord.of(report, end=now, seconds=now - begin))
        for output in report.outputs:
            self._take(output, now)

    def _take(self, output: RequestOutput, now: float) -> None:
        held = self.in_flight[output.id]
        held.take(output, now)
        if output.finish_reason is not None:
            del self.in_flight[output.id]
            self.done.append((held.order, held.finished(output, now)))
        if self.on_output is not None:
            self.on_output(output)
