"""What the server's front and its engine core say to each other. Plain frozen records, cheap to pickle.

Commands go to the core, events come back. A command with a `ticket` is answered by exactly one
`Reply` with the same ticket; a request by outputs up to one with a finish reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from echo_rl.contracts import Request, RequestOutput, RequestTree
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
    """Build this controller and, where it proves sound, let it decide from the next step on."""

    ticket: int
    spec: str
    """As on the command line: ``echo``, ``echo:name=value``, ``ppo:path=...``."""


@dataclass(frozen=True)
class StartExperiment:
    """Alternate two controllers over blocks of time and compare their throughput."""

    ticket: int
    control: str
    treatment: str
    block_seconds: float
    blocks: int
    """Blocks of each arm at most."""
    harm: float
    """Stop as soon as the interval of treatment over control lies wholly below this ratio."""
    seed: int = 0
    """Of the arms' order."""


@dataclass(frozen=True)
class StopExperiment:
    """End the running experiment; the control stays in force."""

    ticket: int


@dataclass(frozen=True)
class Watch:
    """Whether somebody looks at the trees: only then do steps carry them."""

    trees: bool


@dataclass(frozen=True)
class Inspect:
    """Check KV conservation and answer with its verdict and counts of what the core holds."""

    ticket: int


@dataclass(frozen=True)
class Stop:
    """Leave at once; what is still in flight is cancelled."""


Command = Submit | Cancel | SetController | StartExperiment | StopExperiment | Watch | Inspect | Stop


@dataclass(frozen=True)
class StepStats:
    """One step, as the metrics and the live view need it."""

    step: StepRecord
    """What it did; its `end` counts from the epoch."""
    controller: str
    """Spec of the controller in force."""
    plain: int
    """Requests that decoded without drafts because they asked for it; the step's batch leaves them out."""
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
    """How the engine served its steps since the core's start, by way (see `worker.ways_of`); empty where it counts
    nothing."""
    trees: tuple[RequestTree, ...] = ()
    """What was verified, a request each; empty while nobody watches."""

    @property
    def batch(self) -> int:
        """Requests that decoded."""
        return self.step.batch_size + self.plain

    @property
    def committed(self) -> int:
        """Tokens of all requests that decoded."""
        return self.step.committed + self.plain


@dataclass(frozen=True)
class Ready:
    """The engine is loaded."""

    controller: str
    max_context: int
    vocab: int
    environment: dict[str, str] = field(default_factory=dict)
    """What timings depend on: device, dtype, threads, model, drafter."""


@dataclass(frozen=True)
class Stepped:
    """A step's outputs and what it did."""

    outputs: tuple[RequestOutput, ...]
    stats: StepStats

    def __reduce__(self) -> tuple[Any, ...]:
        """Outputs are most of what is sent: as bare rows they take pickle a fraction of the time."""
        return _stepped, (tuple(tuple(vars(output).values()) for output in self.outputs), self.stats)


def _stepped(rows: tuple[tuple[Any, ...], ...], stats: StepStats) -> Stepped:
    return Stepped(tuple(RequestOutput(*row) for row in rows), stats)


@dataclass(frozen=True)
class Refused:
    """A request that the engine cannot serve as it is."""

    request_id: str
    message: str
    unforeseen: bool = False
    """Not for what the request asks: the engine failed on it."""


@dataclass(frozen=True)
class Reply:
    """The answer to a command with a ticket."""

    ticket: int
    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """What was wrong with the command; nothing changed then."""


@dataclass(frozen=True)
class ExperimentReport:
    """The running interval of an experiment; sent when a block ends and when it is over."""

    state: str
    """``running``, ``done``, ``stopped`` (by hand) or ``harm``."""
    value: dict[str, Any]
    """Arms, blocks, tokens/s of each, ratio with its interval, the reason of its end, the controller in force."""


@dataclass(frozen=True)
class Failed:
    """The engine is dead; every request in flight is lost with it."""

    message: str


Event = Ready | Stepped | Refused | Reply | ExperimentReport | Failed
