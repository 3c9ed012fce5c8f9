"""Defines the protocol by which a batch is served between its plan and its commit, and the records of it.

`EagerStep` asks the controller level by level and reads back what it needs; `device.step.DeviceStep` does
the same work without reading anything before the end. Both leave the same cache and the same report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from echo_rl.contracts import NO_GATE, Controller, Forest, PhaseTimes, Selection, SpecPlan, Verdict
from echo_rl.runtime.scheduler import Batch


class Clock:
    """The seconds of a step by phase. A lap counts what has passed since the lap before, or since `resume`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._laps: dict[str, float] = {}

    def resume(self) -> None:
        """Count what has passed since the last lap to no phase."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to this phase."""
        now = self._now()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count a part of one phase, at most all of it, as another's."""
        seconds = min(seconds, self._laps[source])
        self._laps[source] -= seconds
        self._laps[target] = self._laps.get(target, 0.0) + seconds

    def times(self) -> PhaseTimes:
        return PhaseTimes(**self._laps)


@dataclass(frozen=True)
class DraftStats:
    """The drafter's work in numbers. B drafting requests."""

    drafted: int
    """Nodes that it proposed."""
    drafting: tuple[int, ...]
    """Requests that drafted depth d, at index d."""
    confidence: tuple[float, ...]
    """[B] probability of each request's likeliest first token."""
    levels: tuple[int, ...]
    """[B] levels that each request drafted."""

    @classmethod
    def of(cls, forest: Forest) -> DraftStats:
        drafted = np.count_nonzero(forest.scores.cpu().numpy() > NO_GATE)
        levels = tuple(stop + 1 for stop in forest.stop_depth.tolist())
        return cls(int(drafted), forest.drafting, forest.first_confidence, levels)


@dataclass(frozen=True)
class StepResult:
    """The result of a step. Q requests that got a token, R of them decoding."""

    verdict: Verdict
    selection: Selection
    """The verified nodes of the R decoding requests; those that didn't draft have none."""
    draft: DraftStats | None
    """The drafter's work; None in a plain step."""


class Step(Protocol):
    """One way to serve a planned batch whose blocks are reserved. Laps every phase from the plan's to accept's."""

    def run(self, batch: Batch, plan: SpecPlan, controller: Controller, clock: Clock) -> StepResult: ...
