"""The messages between the engine client and the engine core: plain frozen records, cheap to pickle.

Commands go to the core, events come back. A command with a `ticket` is answered by exactly one
`Reply` with the same ticket; a request by outputs up to one with a finish reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from echo_rl.contracts import Request, RequestOutput, RequestTree
from echo_rl.server.config import ExperimentOptions
from echo_rl.workloads.records import StepRecord


@dataclass(frozen=True)
class Submit:
    """Serve a request."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """Drop a request and free its KV before the next step. An unknown id is ignored: it may just have finished."""

    request_id: str


@dataclass(frozen=True)
class SetController:
    """Build this controller and, where its dry run is sound, let it decide from the next step on."""

    ticket: int
    spec: str
    """The controller as on the command line: ``echo``, ``echo:name=value``, ``ppo:path=...``."""


@dataclass(frozen=True)
class StartExperiment:
    """Alternate two controllers over blocks of time and compare their throughput."""

    ticket: int
    options: ExperimentOptions


@dataclass(frozen=True)
class StopExperiment:
    """End the running experiment; the control stays in force."""

    ticket: int


@dataclass(frozen=True)
class TraceTrees:
    """Let steps carry the verified trees, or no longer."""

    enabled: bool


@dataclass(frozen=True)
class Inspect:
    """Check KV conservation and answer with its verdict and counts of what the core holds."""

    ticket: int


@dataclass(frozen=True)
class Stop:
    """End at once; what is still in flight is cancelled."""


Command = Submit | Cancel | SetController | StartExperiment | StopExperiment | TraceTrees | Inspect | Stop


@dataclass(frozen=True)
class StepStats:
    """The statistics of one step, for the metrics and the live view."""

    step: StepRecord
    """The record of the step; its `end` counts from the epoch."""
    controller: str
    """Specification of the active controller."""
    plain: int
    """Requests that decoded without drafts because they asked to; the step's batch leaves them out."""
    running: int
    tokens: int
    """New tokens of all outputs, the first one of each request included."""
    kv_used: float
    knee: int
    """K_max at this batch: most drafted nodes that the machine's cost profile calls worth verifying; 0 = unknown."""
    fallbacks: dict[str, int]
    """Decisions that `echo` took over since the core's start, by cause: ``exception``, ``nan``, ``deadline``,
    ``invalid``."""
    rollbacks: int = 0
    """Times since the core's start that a new controller failed its trial and the one before it came back."""
    serving: dict[str, int] = field(default_factory=dict)
    """Steps since the core's start by how the engine served them, see `worker.serving_counts`."""
    trees: tuple[RequestTree, ...] = ()
    """The verified tree of each request; empty unless `TraceTrees` asked for them."""

    @property
    def batch(self) -> int:
        """Returns how many requests decoded."""
        return self.step.batch_size + self.plain

    @property
    def committed(self) -> int:
        """Returns the tokens of all requests that decoded."""
        return self.step.committed + self.plain


@dataclass(frozen=True)
class Ready:
    """The engine is loaded."""

    controller: str
    max_context: int
    vocab: int
    environment: dict[str, str] = field(default_factory=dict)
    """The settings that timings depend on: device, dtype, threads, model, drafter."""


@dataclass(frozen=True)
class Stepped:
    """The outputs of a step and its statistics."""

    outputs: tuple[RequestOutput, ...]
    stats: StepStats

    def __reduce__(self) -> tuple[Any, ...]:
        """Outputs are most of what is sent: as bare rows they take pickle a fraction of the time."""
        return _stepped, (tuple(tuple(vars(output).values()) for output in self.outputs), self.stats)


def _stepped(rows: tuple[tuple[Any, ...], ...], stats: StepStats) -> Stepped:
    return Stepped(tuple(RequestOutput(*row) for row in rows), stats)


@dataclass(frozen=True)
class Refused:
    """The engine cannot serve this request."""

    request_id: str
    message: str
    unforeseen: bool = False
    """True where the engine failed on it, rather than refused what it asks for."""


@dataclass(frozen=True)
class Reply:
    """The answer to a command with a ticket."""

    ticket: int
    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """The fault of the command, which then changed nothing."""


@dataclass(frozen=True)
class ExperimentReport:
    """The state of an experiment; sent when a block ends and when the experiment is over."""

    state: str
    """``running``, ``done``, ``stopped`` (by hand) or ``harm``."""
    value: dict[str, Any]
    """Arms, blocks, tokens/s of each, ratio with its interval, the reason of its end, the controller in force."""


@dataclass(frozen=True)
class Failed:
    """The engine has failed; every request in flight is lost with it."""

    message: str


Event = Ready | Stepped | Refused | Reply | ExperimentReport | Failed
