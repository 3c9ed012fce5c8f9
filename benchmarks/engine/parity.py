"""Serves the same requests under the same plans three ways: the eager step, the device step as launched, and replayed.

Compares tokens and reports, counts graphs, and has torch name every wait for the device inside a launch. Exits with 1
where float32 tokens differ, nothing was replayed, or a launch waited.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from echo_rl.calibrate.live import calibration_prompts
from echo_rl.config import EngineConfig
from echo_rl.contracts import AUTOREGRESSIVE, LoadView, PhaseTimes, Request, SamplingParams, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.step.device.graphs import Graphs
from echo_rl.runtime.step.device.step import DeviceStep
from echo_rl.runtime.step.eager import EagerStep
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.driver import serve

SHAPES = ((0, 1, 1), (3, 3, 2), (5, 5, 1), (8, 4, 4), (5, 3, 3), (24, 5, 6))
"""(nodes a request, depth, width) of the plans, in turn."""
STRETCH = 6
"""Steps under one plan: enough that its graphs are captured and replayed."""
GATES = ((0, 0.05), (2, 0.02))
CONCURRENCY = (1, 4, 16)
WAYS = ("eager", "launched", "replayed")
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True)
class Args:
    """Compare the ways to serve a step."""

    out: Path
    """The result's file."""
    requests: int = 24
    """Requests a concurrency, half of them greedy."""
    max_new_tokens: int = 48
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: EngineConfig(dtype="float32")
    )


class Turns(BaseController):
    """The shapes in turn, every other one gated; decided by the plan alone. Keeps the reports."""

    name = "turns"

    def __init__(self) -> None:
        super().__init__()
        self._plans = cycle([(shape, gated) for gated in (False, True) for shape in SHAPES for _ in range(STRETCH)])
        self.reports: list[StepReport] = []

    def propose(self, load: LoadView) -> SpecPlan:
        (nodes, depth, width), gated = next(self._plans)
        if not nodes:
            return AUTOREGRESSIVE
        return SpecPlan(nodes * load.batch_size, depth, width, GATES if gated else ())

    def observe(self, report: StepReport) -> None:
        self.reports.append(replace(report, times=PhaseTimes(), confidence=()))


@dataclass(frozen=True)
class Served:
    """Holds what one way of serving gave."""

    tokens: dict[str, tuple[int, ...]]
    reports: tuple[StepReport, ...]
    waits: int | None
    """Waits that torch saw inside launches; None where they can't be seen."""


def served(engine: Engine, requests: Sequence[Request], concurrency: int) -> Served:
    turns = Turns()
    with seen_waits(engine) as waits:
        run = serve(engine, turns, requests, concurrency)
    engine.check_integrity()
    return Served({r.id: r.tokens for r in run.requests}, tuple(turns.reports), waits())


@contextmanager
def seen_waits(engine: Engine) -> Iterator[Callable[[], int | None]]:
    """While open, counts the operations inside the device step's launches that torch says wait for a GPU.

    Launches that compile or capture do wait, so ask again of requests that were served before.
    """
    step, found = engine.serving, 0
    if engine.runner.device.type != "cuda" or not isinstance(step, DeviceStep):
        yield lambda: None
        return
    launch = step.launch

    def watched(*args: Any) -> torch.Tensor:
        nonlocal found
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return launch(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found += sum("synchroniz" in str(warning.message) for warning in said)

    step.launch = watched  # type: ignore[assignment, method-assign]
    try:
        yield lambda: found
    finally:
        step.launch = launch  # type: ignore[method-assign]


def serving(engine: Engine, way: str) -> EagerStep | DeviceStep:
    """A new step that serves in that way."""
    eager = EagerStep(engine.runner, engine.config.max_nodes)
    if way == "eager":
        return eager
    step = DeviceStep(engine.runner, engine.config, eager)
    if way == "launched":
        step.graphs = Graphs(None)
    return step


def compared(expected: Served, got: Served) -> dict[str, Any]:
    pairs = list(zip(expected.reports, got.reports, strict=False))
    return {
        "requests": len(expected.tokens),
        "tokens": sum(map(len, expected.tokens.values())),
        "differing": sum(got.tokens[key] != tokens for key, tokens in expected.tokens.items()),
        "steps": len(got.reports),
        "differing_reports": sum(a != b for a, b in pairs) + abs(len(expected.reports) - len(got.reports)),
    }


def compare(engine: Engine, requests: Sequence[Request], concurrency: int) -> list[dict[str, Any]]:
    """A row each way, against the eager step; everything is served twice, the second time after all is captured."""
    rows, expected = [], None
    for way in WAYS:
        step = engine.serving = serving(engine, way)
        first, second = (served(engine, requests, concurrency) for _ in range(2))
        expected = expected or first
        row = {"way": way, "in_flight": concurrency, **compared(expected, first)}
        row["differing_again"] = compared(expected, second)["differing"]
        row["waits"] = second.waits
        if isinstance(step, DeviceStep):
            row |= {"device_steps": step.counts.device, "eager_steps": dict(step.counts.eager)}
            row |= {"landings": step.landing.waits, "graphs": asdict(step.graphs.counts)}
        rows.append(row)
    return rows


def faults(rows: Sequence[dict[str, Any]], exact: bool, captures: bool) -> list[str]:
    """Says what is wrong in the rows, one sentence each."""
    found = []
    for row in rows:
        name = f"{row['way']}, {row['in_flight']} in flight"
        if exact and (row["differing"] or row["differing_again"]):
            found.append(f"{name}: tokens differ")
        if row["waits"]:
            found.append(f"{name}: {row['waits']} waits inside launches")
        if captures and row["way"] == "replayed" and not row["graphs"]["replayed"]:
            found.append(f"{name}: nothing was replayed")
        if row.get("landings", 0) != row.get("device_steps", 0):
            found.append(f"{name}: {row['landings']} landings of {row['device_steps']} steps")
    return found


def requests_of(engine: Engine, count: int, max_new_tokens: int) -> list[Request]:
    turns = calibration_prompts()
    return [
        Request(
            f"p{i}",
            engine.tokenizer.chat([{"role": "user", "content": turns[i % len(turns)]}]),
            SamplingParams(TEMPERATURES[i % 2], seed=i, max_new_tokens=max_new_tokens, ignore_eos=True),
        )
        for i in range(count)
    ]


def script() -> int:
    args = tyro.cli(Args, description=__doc__)
    engine = Engine.load(args.engine)
    dtype, captures = engine.runner.target.embed.dtype, engine.runner.device.type == "cuda"
    requests, rows = requests_of(engine, args.requests, args.max_new_tokens), []
    for concurrency in CONCURRENCY:
        rows += compare(engine, requests, concurrency)
        wrong = faults(rows, dtype == torch.float32, captures)
        write_json(args.out, {"dtype": str(dtype), "rows": rows, "faults": wrong})
    print("\n".join(wrong) or "equal")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(script())
