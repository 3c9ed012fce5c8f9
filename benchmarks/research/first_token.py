"""What the first token of a request waits for, by controller: on a replay in simulated time, or live (`--live`).

The time to the first token is split into the wait for a place in the batch, the wait for the prompts ahead and the
steps that read the prompt itself, each a number of steps times how long they took. Every arm serves the same
requests in the same order, in a closed loop and as they arrive by themselves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from benchmarks.common import CONSOLE, EngineOptions, Place, main
from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller
from echo_rl.controllers.registry import make
from echo_rl.experiments.targets.backend import Target
from echo_rl.experiments.targets.live import live_target
from echo_rl.experiments.targets.replay import replay_target
from echo_rl.replay.levels import Level
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import write_json
from echo_rl.utils.terminal import fitted
from echo_rl.workloads.arrivals import poisson
from echo_rl.workloads.metrics import SLO, goodput, mean_accepted_tokens, tokens_per_second, tpot
from echo_rl.workloads.records import RunRecord, StepRecord, pool
from echo_rl.workloads.requests import Rotation

NEAR = {"p50": (45.0, 55.0), "p95": (92.5, 97.5)}
"""The percentiles between which requests stand for a quantile: their parts are averaged."""


@dataclass(frozen=True)
class Wait:
    """What one request's first token waited for; seconds, but for `steps` and `reads`."""

    arrival: float
    ttft: float
    begun: float
    """The rest of the step that was under way at its arrival."""
    admission: float
    """Until it had a place in the batch."""
    queue: float
    """Until the prompts ahead of it were read."""
    reading: float
    """The steps that read its own prompt; the last one gives the first token."""
    steps: int
    """Steps from its arrival to its first token."""
    reads: int
    """Of them those that read its own prompt."""


PARTS = ("begun", "admission", "queue", "reading")
TITLES = {"all": "All requests", "steady": "Without those that were sent all at once, or first"}


@dataclass(frozen=True)
class Study:
    """The arms and the loads."""

    arms: tuple[str, ...] = ("none", "echo", "ppo")
    """The first one is what the others are held against, and sets the rate of the open load."""
    concurrency: int = 64
    rounds: int = 4
    """Requests a block, in rounds of `concurrency`."""
    blocks: int = 3
    max_tokens: int = 48
    utilisation: float = 0.9
    """Rate of the open arrivals, as a share of the requests a second that the first arm serves in the closed loop."""
    slo_ttft: float = 2.0
    slo_tpot: float = 0.2


@dataclass(frozen=True)
class Args:
    """Measure what first tokens wait for."""

    quick: bool = False
    """16 in flight, one block."""
    live: bool = False
    """On the engine by the real clock, instead of a replay."""
    trace: Path | None = None
    """The recorded requests; None takes the packaged ones."""
    study: Annotated[Study, tyro.conf.arg(name="")] = field(default_factory=Study)
    engine: EngineOptions = field(default_factory=EngineConfig)


def waits(record: RunRecord) -> list[Wait]:
    """One a finished request, in order of arrival; prompts must have been read first come first served.

    A request's prompt is read by the steps in which the prompt tokens read in all pass those of all before it; it is
    admitted in the first step after whose admission fewer wait than came after it.
    """
    steps, begins = record.steps, [step.end - step.seconds for step in record.steps]
    read = list(accumulate(step.prefill_tokens for step in steps))
    arrivals = [request.arrival for request in record.requests]
    admitted = [bisect_right(arrivals, begin + 1e-9) - step.waiting for begin, step in zip(begins, steps, strict=True)]
    admitted = list(accumulate(admitted, max))
    found, ahead = [], 0
    for place, request in enumerate(record.requests):
        first, ahead = bisect_right(read, ahead), ahead + request.prompt_tokens
        if request.cut or not request.token_times:
            continue
        last, taken = bisect_left(read, ahead), bisect_right(admitted, place)
        came = bisect_left(begins, request.arrival - 1e-9)
        marks = (request.arrival, begins[came], begins[taken], begins[first], steps[last].end)
        parts = dict(zip(PARTS, np.diff(marks).tolist(), strict=True))
        first_token = request.token_times[0] - request.arrival
        found.append(Wait(request.arrival, first_token, **parts, steps=last - came + 1, reads=last - first + 1))
    return found


def cut(trace: Trace, tokens: int) -> Trace:
    """The trace of answers that end after so many tokens."""
    lengths = [min(r.length, tokens) for r in trace.responses]
    rows = np.concatenate([first + np.arange(length - 1) for first, length in zip(trace.first, lengths, strict=True)])
    levels = tuple(Level(v.scores[rows], v.parents[rows], v.path[rows]) for v in trace.levels)
    responses = []
    for response, length in zip(trace.responses, lengths, strict=True):
        params = replace(response.params, max_new_tokens=tokens)
        reason = "length" if length < response.length else response.finish_reason
        responses.append(replace(response, length=length, params=params, finish_reason=reason))
    return Trace(tuple(responses), levels, trace.provenance)


def study(setting: Study, target: Target) -> list[dict[str, Any]]:
    """The cells: closed loop first, then open arrivals at a rate that follows from it."""
    runs: dict[tuple[str, str], list[RunRecord]] = {}
    for block in range(setting.blocks):
        for arm in turned(setting.arms, block):
            runs.setdefault(("closed", arm), []).append(closed_run(setting, target, make(arm), block))
    base = pool(runs["closed", setting.arms[0]])
    rate = setting.utilisation * len(base.requests) / base.seconds
    for block in range(setting.blocks):
        for arm in turned(setting.arms, block):
            seconds = setting.rounds * setting.concurrency / rate
            record = target.drive(make(arm), poisson(rate), seed=block, seconds=seconds)
            runs.setdefault(("open", arm), []).append(record)
    return [cell(setting, load, arm, records) for (load, arm), records in runs.items()]


def turned(arms: Sequence[str], block: int) -> Sequence[str]:
    """The arms in another order in every other block."""
    CONSOLE.print(f"block {block}: {', '.join(arms)}", highlight=False)
    return arms if block % 2 == 0 else arms[::-1]


def closed_run(setting: Study, target: Target, controller: Controller, block: int) -> RunRecord:
    source = Rotation(target.requests, block)
    requests = [source("") for _ in range(setting.rounds * setting.concurrency)]
    return target.serve(controller, requests, setting.concurrency, block)


def cell(setting: Study, load: str, arm: str, records: Sequence[RunRecord]) -> dict[str, Any]:
    every = pool(records)
    found = [(wait, place >= setting.concurrency) for record in records for place, wait in enumerate(waits(record))]
    slo = SLO(setting.slo_ttft, setting.slo_tpot)
    return {
        "load": load,
        "arm": arm,
        "tokens_per_second": tokens_per_second(every),
        "goodput": goodput(every, slo),
        "mat": mean_accepted_tokens(every.steps),
        "tpot": fmean(value for request in every.requests if (value := tpot(request)) is not None),
        "ttft": {"all": quantiles(w for w, _ in found), "steady": quantiles(w for w, steady in found if steady)},
        "step": lengths(every.steps),
    }


def quantiles(found: Iterable[Wait]) -> dict[str, Any]:
    """Each quantile of the time to the first token, with the mean parts of the requests near it."""
    ordered = sorted(found, key=lambda wait: wait.ttft)
    result: dict[str, Any] = {"mean": _parts(ordered)}
    for name, (low, high) in NEAR.items():
        near = ordered[int(low / 100 * len(ordered)) : max(1, int(high / 100 * len(ordered)) + 1)]
        exact = np.percentile([wait.ttft for wait in ordered], float(name[1:]))
        result[name] = {"quantile": float(exact), **_parts(near)}
    return result


def _parts(near: Sequence[Wait]) -> dict[str, float]:
    names = ("ttft", *PARTS, "steps", "reads")
    return {name: fmean(getattr(wait, name) for wait in near) for name in names}


def lengths(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Mean seconds of a step and of its parts, and what shares it, over the steps that read prompts."""
    reading = [step for step in steps if step.prefill_tokens]
    return {
        "steps": len(steps),
        "reading": len(reading),
        "seconds": fmean(s.seconds for s in reading),
        "draft": fmean(s.times.draft for s in reading),
        "verify": fmean(s.times.verify for s in reading),
        "decoding": fmean(s.batch_size for s in reading),
        "verified": fmean(s.verified for s in reading),
        "prefill": fmean(s.prefill_tokens for s in reading),
    }


def table(cells: Sequence[Mapping[str, Any]], part: str, width: int) -> Table:
    """The quantiles with their parts in milliseconds; `part` is "all" or "steady"."""
    rows = [
        ((each["load"], each["arm"], name), _milliseconds(each["ttft"][part][name]) | _rates(each))
        for each in cells
        for name in NEAR
    ]
    return fitted(TITLES[part], ("load", "arm", ""), rows, width, kept=1 + len(PARTS))


def _milliseconds(near: Mapping[str, float]) -> dict[str, str]:
    parts = {name: f"{1e3 * near[key]:.0f}" for name, key in zip(("TTFT", *PARTS), ("quantile", *PARTS), strict=True)}
    return parts | {"steps": f"{near['steps']:.1f}", "ms/step": f"{1e3 * near['ttft'] / near['steps']:.0f}"}


def _rates(cell: Mapping[str, Any]) -> dict[str, str]:
    names = {"tokens_per_second": "tokens/s", "goodput": "goodput/s", "mat": "MAT"}
    return {head: f"{cell[name]:.2f}" for name, head in names.items()} | {"TPOT": f"{1e3 * cell['tpot']:.0f}"}


def script() -> None:
    args = tyro.cli(Args)
    setting = replace(args.study, concurrency=16, rounds=2, blocks=1, max_tokens=16) if args.quick else args.study
    place = Place("first_token_live" if args.live else "first_token", args.quick)
    trace = cut(Trace.of(args.trace), setting.max_tokens)
    target = live_target(args.engine, trace, CONSOLE) if args.live else replay_target(trace, noise=False)
    cells = study(setting, target)
    write_json(place.result, {"config": asdict(setting), "environment": dict(target.environment), "cells": cells})
    CONSOLE.print(*(table(cells, part, CONSOLE.width) for part in TITLES))
    for each in cells:
        CONSOLE.print(each["load"], each["arm"], {k: round(v, 4) for k, v in each["step"].items()}, highlight=False)


if __name__ == "__main__":
    main(script)
