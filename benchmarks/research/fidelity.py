"""How well a replay stands for the live loop: accepted tokens (must be equal), throughput, ranking, and speed.

Predicted times are as good as their profile, and machines drift: the costs are measured right before and right after
the arms of each load, and a replay is charged the mean of the two. Needs a trace of the benchmark's prompts:
``echo-rl record --width 10 --out benchmarks/results/work/trace``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import kendalltau

from benchmarks.common import CONSOLE, RESULTS, EngineOptions, Ledger, Place, main
from echo_rl.calibrate.cost import Grid
from echo_rl.calibrate.live import measured_profile
from echo_rl.config import EngineConfig
from echo_rl.contracts import Backend, Request
from echo_rl.controllers import registry
from echo_rl.controllers.arm import Arm
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.batched_profile import SCALARS, BatchedCostProfile
from echo_rl.costs.interpolation import monotone
from echo_rl.costs.profile import CostProfile
from echo_rl.env.vector_env import REFERENCE, ReplayEnvOptions, ReplayVectorEnv
from echo_rl.replay.backend import ReplayBackend
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.trace import Trace
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import load_engine
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.arrivals import closed
from echo_rl.workloads.driver import serve
from echo_rl.workloads.records import RunRecord

EXACT = ("chain", "static", "eagle3:total=30,depth=6,top_k=6", "echo:nodes=7", "echo_unscheduled:nodes=3")
ARMS = (
    "none", "chain", "eagle3:total=30,depth=6,top_k=8", "static",
    "fixed:nodes=1,depth=2,width=2", "fixed:nodes=2,depth=3,width=3",
    "fixed:nodes=5,depth=4,width=3", "fixed:nodes=15,depth=5,width=4", "echo",
)  # fmt: skip
QUICK_GRID = Grid((1, 8), (1, 8, 32), (64,), (1, 3), (1, 3), repeats=1)


@dataclass(frozen=True)
class Args:
    """Compare replay with the live loop."""

    quick: bool = False
    """Fewer arms, loads and steps."""
    trace: Path = RESULTS / "work" / "trace" / "trace.safetensors"
    concurrency: tuple[int, ...] = (1, 8)
    blocks: int = 4
    exact_steps: int = 2_000
    """Steps that must be equal, over the controllers together."""
    engine: EngineOptions = field(default_factory=EngineConfig)


def script() -> None:
    args = tyro.cli(Args)
    if args.quick:
        args = replace(args, concurrency=(1, 8), blocks=1, exact_steps=200)
    place = Place("fidelity", args.quick)
    trace = Trace.load(args.trace)
    engine, environment = load_engine(args.engine)
    ledger = Ledger(place.work, {"environment": environment, "quick": args.quick})
    grid = QUICK_GRID if args.quick else Grid(batches=(1, 2, 4, 8, 16, 32))
    cells: list[dict[str, Any]] = []

    def costs_at(turn: int) -> CostProfile:
        measured = place.work / f"costs{turn}" / "profile.json"
        if measured.is_file():
            return CostProfile.load(measured)
        return measured_profile(engine, environment, grid, measured.parent, CONSOLE)

    before = costs_at(0)
    for turn, (block, concurrency) in enumerate(product(range(args.blocks), args.concurrency)):
        arms = [Comparison(arm, concurrency, block, before) for arm in (ARMS if block % 2 == 0 else ARMS[::-1])]
        live = [ledger.cell(arm.key | {"side": "live"}, partial(arm.live, engine, trace)) for arm in arms]
        after = costs_at(turn + 1)
        costs = BatchedCostProfile(mean_profile(before, after))
        replayed = [ledger.cell(arm.key | {"side": "replay"}, partial(arm.replayed, trace, costs)) for arm in arms]
        cells += [arm.key | {"live": x, "replay": y} for arm, x, y in zip(arms, live, replayed, strict=True)]
        before = after
    result = {
        "environment": environment,
        "cells": cells,
        **agreement(cells),
        "speed": ledger.cell({"part": "speed"}, lambda: speed(trace, costs)),
        "exact": ledger.cell({"part": "exact"}, lambda: exactness(args.engine, trace, args.exact_steps, place.work)),
    }
    write_json(place.result, result)
    CONSOLE.print({name: value for name, value in result.items() if name not in ("cells", "environment")})


@dataclass(frozen=True)
class Comparison:
    """An arm's throughput (tokens a second) on the same requests, live and replayed. Both serve a warm-up first, and
    both plan by the costs from before."""

    arm: str
    concurrency: int
    block: int
    costs: CostProfile

    @property
    def key(self) -> dict[str, Any]:
        return {"arm": self.arm, "concurrency": self.concurrency, "block": self.block}

    def live(self, engine: Engine, trace: Trace) -> float:
        return self._throughput(engine, trace, time.perf_counter)

    def replayed(self, trace: Trace, costs: BatchedCostProfile) -> float:
        backend = ReplayBackend(trace, costs, seed=self.block)
        return self._throughput(backend, trace, backend.clock)

    def _throughput(self, server: Backend, trace: Trace, clock: Callable[[], float]) -> float:
        count, parsed = max(6, 2 * self.concurrency), Arm.parse(self.arm)
        part = self.block % max(1, len(trace.responses) // count)
        requests = [r for i, r in enumerate(trace.requests()) if i // count == part]
        controller = registry.planning_by(self.costs)(parsed.controller, **parsed.options)
        serve(server, controller, requests[: min(4, self.concurrency)], self.concurrency, clock=clock)
        run = serve(server, controller, requests, self.concurrency, clock=clock)
        return run.output_tokens / run.seconds


def mean_profile(a: CostProfile, b: CostProfile) -> CostProfile:
    """The mean of two measurements of a machine on the same grid."""
    scalars: dict[str, Any] = {name: (getattr(a, name) + getattr(b, name)) / 2.0 for name in SCALARS}
    verify, draft = ((np.asarray(x) + np.asarray(y)) / 2.0 for x, y in ((a.verify, b.verify), (a.draft, b.draft)))
    return replace(a, verify=monotone(verify), draft=monotone(draft), **scalars)


def kendall(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Kendall's tau-b (1945) of two rankings, by the names that both score; ties count half on their side.

    1 where they agree on every pair, -1 where on none; None where either cannot tell any two apart.
    """
    names = sorted(a.keys() & b.keys())
    if len(names) < 2:
        return None
    tau = float(kendalltau(*([scores[name] for name in names] for scores in (a, b)))[0])
    return None if math.isnan(tau) else tau


def agreement(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median absolute error of the predicted throughput, Kendall's tau of the rankings at each load, and how far apart
    live those arms are at most which the two rank differently."""
    pooled: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        pooled.setdefault((cell["concurrency"], cell["arm"]), []).append(cell)
    mean = {k: {side: np.mean([c[side] for c in v]) for side in ("live", "replay")} for k, v in pooled.items()}
    errors = [abs(rates["replay"] / rates["live"] - 1.0) for rates in mean.values()]
    taus, swapped = {}, 1.0
    for load in sorted({k[0] for k in mean}):
        sides = [{k[1]: float(r[side]) for k, r in mean.items() if k[0] == load} for side in ("live", "replay")]
        taus[str(load)] = kendall(*sides)
        for pair in combinations(sides[0], 2):
            live, replay = (side[pair[0]] / side[pair[1]] for side in sides)
            if (live - 1.0) * (replay - 1.0) < 0.0:
                swapped = max(swapped, live, 1.0 / live)
    return {
        "median_error": float(np.median(errors)),
        "largest_error": float(np.max(errors)),
        "kendall_tau": taus,
        "most_apart_if_swapped": swapped,
        "mean_tau": float(np.mean([tau for tau in taus.values() if tau is not None])),
    }


def speed(trace: Trace, costs: BatchedCostProfile) -> dict[str, float]:
    """Serving steps a second of the vectorised replay, by batch size, 32 environments under random actions."""
    gates, few = GateCalibration.default(), trace.subset(range(0, len(trace.responses), 4))
    rates = {}
    for batch in (1, 4, 16, 32):
        options = ReplayEnvOptions(
            (closed(batch),), gates=gates.sparse(9), score_power=gates.score_power, horizon=64, action_repeat=4,
            reference=REFERENCE, shared=True, stagger=True,
        )  # fmt: skip
        env = ReplayVectorEnv(few, costs, options, 32)
        env.reset(seed=0)
        actions = np.random.default_rng(0).integers(0, options.table.sizes, (100, 32, len(options.table.sizes)))
        begin = time.perf_counter()
        for action in actions:
            env.step(action)
        rates[str(batch)] = len(actions) * 32 * options.action_repeat / (time.perf_counter() - begin)
    return rates


def exactness(config: EngineConfig, trace: Trace, steps: int, work: Path) -> dict[str, int]:
    """fp32: steps compared, and steps that differed in anything but time."""
    options = RecordOptions()
    engine, _ = load_engine(replace(config, dtype="float32", max_expanded=options.expanded))
    eos = frozenset(engine.runner.target.arch.eos)
    requests = [replace(r, params=replace(r.params, max_new_tokens=48)) for r in trace.requests()[:24]]
    recorded = record(engine, requests, eos, options, work / "fp32", "float32", CONSOLE)
    compared = differed = 0
    while compared < steps:
        for arm in EXACT:
            parsed = Arm.parse(arm)
            for concurrency in (1, 4, 8):
                if compared >= steps:
                    break
                live, replayed = (
                    same_but_time(serve(server, registry.make(parsed.controller, **parsed.options), part, concurrency))
                    for part in (_part(requests, concurrency),)
                    for server in (engine, ReplayBackend(recorded, BatchedCostProfile(CostProfile.default())))
                )
                compared += max(len(live), len(replayed))
                differed += sum(a != b for a, b in zip(live, replayed, strict=False)) + abs(len(live) - len(replayed))
    return {"steps": compared, "controllers": len(EXACT), "differed": differed}


def _part(requests: Sequence[Request], concurrency: int) -> list[Request]:
    return list(requests[: 4 * concurrency] if concurrency > 1 else requests[:6])


def same_but_time(run: RunRecord) -> list[dict[str, Any]]:
    """Everything about the steps that a replay must reproduce."""
    left_out = {"end", "seconds", "times"}
    return [{k: v for k, v in asdict(step).items() if k not in left_out} for step in run.steps]


if __name__ == "__main__":
    main(script)
