"""Records a run: its requests and its steps, as plain data that survives JSON.

All times are seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

from echo_rl.contracts import PhaseTimes, StepReport
from echo_rl.errors import ConfigError

CUT = "cancelled"
"""The finish reason of a request that the end of its run cut off."""


@dataclass(frozen=True)
class RequestRecord:
    """One request. `token_times[i]` is when `tokens[i]` reached the caller."""

    id: str
    prompt_tokens: int
    arrival: float
    finish: float
    tokens: tuple[int, ...]
    token_times: tuple[float, ...]
    finish_reason: str
    error: str | None = None

    @property
    def cut(self) -> bool:
        """True where the run ended before it: its tokens count, its latencies do not."""
        return self.finish_reason == CUT


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
    """One run: its requests in the order they came, its steps in the order taken."""

    controller: str
    concurrency: int
    """Requests held in flight by `serve`; the most that were, under `drive`."""
    seconds: float
    requests: tuple[RequestRecord, ...]
    steps: tuple[StepRecord, ...]

    @property
    def output_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)

    @property
    def busy_seconds(self) -> float:
        """Seconds spent in steps: what is left of `seconds` without the waits for arrivals."""
        return sum(step.seconds for step in self.steps)

    @property
    def request_seconds(self) -> float:
        """Seconds in flight, summed over requests, cut ones included: the time that all users together waited."""
        return sum(request.finish - request.arrival for request in self.requests)

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
    """Runs of one controller under one load as if they were one; `seconds` is their sum."""
    if not records:
        raise ConfigError("there are no runs to pool")
    return RunRecord(
        controller=records[0].controller,
        concurrency=max(record.concurrency for record in records),
        seconds=sum(record.seconds for record in records),
        requests=tuple(request for record in records for request in record.requests),
        steps=tuple(step for record in records for step in record.steps),
    )


def _row(step: StepRecord) -> list[Any]:
    """The fields of a step in order, phase times as a list."""
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
