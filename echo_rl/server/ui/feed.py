"""The frames of the live view: a server's steps, summed between them. Pure: no clock, no server, no HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from echo_rl.contracts import PhaseTimes, RequestTree
from echo_rl.server.messages import ExperimentReport, StepStats
from echo_rl.server.specs import public_report, public_spec
from echo_rl.workloads.metrics import PHASES

MOST_TREES = 32
"""Most requests whose trees a frame carries; the page has no room for more."""

COUNTERS = ("prefill_tokens", "budget", "depth", "width", "drafted", "verified", "accepted")
"""Fields of `StepRecord` that a frame sums over its steps."""

Event = tuple[str, dict[str, Any]]
"""A server-sent event: its name and its data."""


class Feed:
    """Gathers updates until the next frame is due; memory does not grow with their number."""

    def __init__(self) -> None:
        self._experiment: ExperimentReport | None = None
        self._clear()

    def add(self, item: StepStats | ExperimentReport) -> None:
        """Adds an update; a newer report of an experiment replaces the one that was not yet taken."""
        if isinstance(item, ExperimentReport):
            self._experiment = item
        else:
            self._add_step(item)

    def take(self) -> list[Event]:
        """Returns the events of one frame: always ``steps``, and ``experiment`` where there is a new report.

        Counters of ``steps`` are sums over its steps, and so is ``requests`` (decoding requests); ``step`` is
        the last one of them that decoded, with its trees. Times are seconds.
        """
        events: list[Event] = [("steps", self._frame())]
        if self._experiment is not None:
            events.append(("experiment", experiment_data(self._experiment)))
        self._experiment = None
        self._clear()
        return events

    def _clear(self) -> None:
        self._last: StepStats | None = None
        self._shown: StepStats | None = None
        self._counts = dict.fromkeys((*COUNTERS, "committed"), 0)
        self._times = dict.fromkeys(PHASES, 0.0)
        self._steps = self._requests = self._known_knees = self._knees = 0
        self._seconds = 0.0
        self._reached: tuple[int, ...] = ()
        self._accepted: tuple[int, ...] = ()

    def _add_step(self, stats: StepStats) -> None:
        self._last = stats
        if stats.batch:
            self._shown = stats
        self._steps += 1
        self._requests += stats.batch
        self._seconds += stats.step.seconds
        self._knees += stats.knee
        self._known_knees += bool(stats.knee)
        for name in COUNTERS:
            self._counts[name] += getattr(stats.step, name)
        self._counts["committed"] += stats.committed
        for phase, seconds in phases(stats.step.times).items():
            self._times[phase] += seconds
        self._reached = add_ragged(self._reached, stats.step.reached_by_depth)
        self._accepted = add_ragged(self._accepted, stats.step.accepted_by_depth)

    def _frame(self) -> dict[str, Any]:
        if self._last is None:
            return {"steps": 0}
        last = self._last
        other = max(0.0, self._seconds - sum(self._times.values()))
        return {
            "time": last.step.end,
            "steps": self._steps,
            "seconds": self._seconds,
            "controller": public_spec(last.controller),
            "batch": last.batch,
            "running": last.running,
            "waiting": last.step.waiting,
            "kv_used": last.kv_used,
            "requests": self._requests,
            **self._counts,
            "knee": self._knees / self._known_knees if self._known_knees else None,
            "reached_by_depth": self._reached,
            "accepted_by_depth": self._accepted,
            "times": {**self._times, "other": other},
            "step": step_data(self._shown) if self._shown is not None else None,
        }


def step_data(stats: StepStats) -> dict[str, Any]:
    """Returns one step by itself, as the picture of the super-tree needs it."""
    names = ("budget", "depth", "width", "verified", "accepted")
    return {name: getattr(stats.step, name) for name in names} | {
        "time": stats.step.end,
        "batch": stats.batch,
        "knee": stats.knee,
        "committed": stats.committed,
        "trees": [tree_data(tree) for tree in stats.trees[:MOST_TREES]],
    }


def tree_data(tree: RequestTree) -> dict[str, Any]:
    """Returns a tree without depths, which follow from the parents: these precede their children."""
    return {
        "id": tree.id,
        "parents": tree.parents,
        "accepted": tree.accepted,
        "drafted_depth": tree.drafted_depth,
    }


def experiment_data(report: ExperimentReport) -> dict[str, Any]:
    """Returns the report without folders."""
    return {**public_report(report.value), "state": report.state}


def phases(times: PhaseTimes) -> dict[str, float]:
    return {phase: getattr(times, phase) for phase in PHASES}


def add_ragged(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sum by index; the shorter one counts as zero beyond its end."""
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))


def encode(event: Event) -> bytes:
    """Returns a server-sent event as it is sent. A number that JSON lacks (NaN, infinity) becomes null."""
    name, data = event
    text = json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
    return f"event: {name}\ndata: {text}\n\n".encode()


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
