"""Controllers through HTTP at several concurrencies, in interleaved blocks; goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import tyro
from matplotlib import rc_context

from benchmarks.common import CONSOLE, EngineOptions, Place, main
from benchmarks.server.client import load_of
from benchmarks.server.process import Server
from echo_rl.config import EngineConfig
from echo_rl.experiments.plan import Run
from echo_rl.experiments.report import plots
from echo_rl.experiments.report.load import report
from echo_rl.experiments.run import run_missing
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.experiments.targets.http.target import HttpTarget, Keys
from echo_rl.utils import plotting
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.workloads.datasets import load_prompts

LOGGED = ("time", "level", "logger", "message", "controller")
"""What a line of the log holds beside the engine's environment."""


@dataclass(frozen=True)
class Sweep:
    """The controllers and the loads of the sweep."""

    arms: tuple[str, ...] = ("none", "eagle3", "echo", "ppo")
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    blocks: int = 4
    requests: int = 6
    """Requests a block; twice the concurrency where that is more."""
    max_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True)
class Args:
    """Measure controllers through HTTP."""

    quick: bool = False
    """Two controllers, two concurrencies, two short blocks."""
    sweep: Annotated[Sweep, tyro.conf.arg(name="")] = field(default_factory=Sweep)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Sweep:
        if not self.quick:
            return self.sweep
        return replace(self.sweep, arms=("none", "echo"), concurrency=(1, 4), blocks=2, requests=2, max_tokens=16)


def sweep(setting: Sweep, engine: EngineConfig, place: Place) -> dict[str, Any]:
    """Every arm at every concurrency, blocks outermost, as in `echo-rl load --arms`."""
    prompts = load_prompts("all", seed=setting.seed)
    with Server(engine, place.work / "server.log") as server:
        url = server.ready()
        environment = {key: value for key, value in server.lines("ready")[0].items() if key not in LOGGED}
        store: ResultStore[Run, LoadRecord] = ResultStore.in_folder(place.work, setting, environment, LoadRecord)
        configs = {f"closed:{load}": config(setting, url, load) for load in setting.concurrency}
        sessions = {workload: HttpTarget(each, prompts, Keys()) for workload, each in configs.items()}
        every = replace(next(iter(configs.values())), workloads=tuple(configs))
        done = run_missing(every.runs, store, lambda run: sessions[run.workload].run(run), CONSOLE)
    workloads = {workload: session.workloads[workload] for workload, session in sessions.items()}
    found = report(every, workloads, done, environment)
    cells = [{**cell, **as_in_a_bench(cell)} for cell in found["cells"]]
    return {**found, "config": asdict(setting), "cells": cells}


def config(setting: Sweep, url: str, concurrency: int) -> LoadConfig:
    return load_of(
        url,
        concurrency,
        max(setting.requests, 2 * concurrency),
        controllers=setting.arms,
        blocks=setting.blocks,
        max_tokens=setting.max_tokens,
        seed=setting.seed,
    )


def as_in_a_bench(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What the plots of `echo-rl bench` call the same things."""
    return {
        "concurrency": int(cell["workload"].partition(":")[2]),
        "throughput": cell["rates"]["tokens_per_second"],
        "speedup": cell["ratios"].get("tokens_per_second"),
    }


def script() -> None:
    args = tyro.cli(Args)
    place = Place("server", args.quick)
    result = sweep(args.sized(), args.engine, place)
    write_json(place.result, result)
    with rc_context(plotting.STYLE):
        plots.throughput(result).savefig(place.result.with_suffix(".png"), bbox_inches="tight")
    CONSOLE.print(f"{place.result} is written", highlight=False)


if __name__ == "__main__":
    main(script)
