"""What a server adds to its engine: nothing to the outputs, little to the time.

identity: answers through HTTP, with 32 requests in flight and a change of controller under way every
moment, against what the engine gives by itself, one plain request at a time, in float32.
overhead: the engine's throughput in this process against the same requests through HTTP, in turn.
sweep: controllers through HTTP at several concurrencies, in interleaved blocks.

Each part writes a result of its own and goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import tyro
from matplotlib import rc_context

from common import CONSOLE, EngineOptions, Place, main
from echo_rl.config import EngineConfig
from echo_rl.experiments.bench import run_missing
from echo_rl.experiments.load.config import LoadConfig
from echo_rl.experiments.load.record import LoadRecord
from echo_rl.experiments.load.report import report
from echo_rl.experiments.load.run import Keys, Session
from echo_rl.experiments.plan import Trial, trials
from echo_rl.experiments.report import plots
from echo_rl.utils import plotting, statistics
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.workloads.datasets import load_prompts
from server_identity import Identity, identity
from server_load import load_of
from server_overhead import Overhead, overhead
from serving import Server

Part = Literal["identity", "overhead", "sweep"]
LOGGED = ("time", "level", "logger", "message", "controller")
"""What a line of the log holds beside the engine's environment."""


@dataclass(frozen=True)
class Sweep:
    arms: tuple[str, ...] = ("none", "eagle3", "echo", "ppo")
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    blocks: int = 4
    requests: int = 6
    """Requests a block; twice the concurrency where that is more."""
    max_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True)
class Args:
    """Measure the server."""

    quick: bool = False
    """A look at each part, half a minute each."""
    parts: tuple[Part, ...] = ("identity", "overhead", "sweep")
    identity: Identity = field(default_factory=Identity)
    overhead: Overhead = field(default_factory=Overhead)
    sweep: Sweep = field(default_factory=Sweep)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        if not self.quick:
            return self
        return replace(
            self,
            identity=replace(self.identity, requests=6, times=4, max_tokens=12, concurrency=6, swaps=5),
            overhead=replace(self.overhead, controllers=("none",), requests=16, max_tokens=16, blocks=3),
            sweep=replace(self.sweep, arms=("none", "echo"), concurrency=(1, 4), blocks=2, requests=2, max_tokens=16),
        )


def sweep(setting: Sweep, engine: EngineConfig, place: Place) -> dict[str, Any]:
    """Every arm at every concurrency, blocks outermost, as in `echo-rl load --arms`."""
    prompts = load_prompts("all", seed=setting.seed)
    with Server(engine, place.work / "server.log") as server:
        url = server.ready()
        environment = {key: value for key, value in server.lines("ready")[0].items() if key not in LOGGED}
        store: ResultStore[Trial, LoadRecord] = ResultStore.in_folder(place.work, setting, environment, LoadRecord)
        configs = {f"closed:{load}": config(setting, url, load) for load in setting.concurrency}
        sessions = {workload: Session(each, prompts, Keys()) for workload, each in configs.items()}
        every = replace(next(iter(configs.values())), workloads=tuple(configs))
        order = list(trials(every.trials))
        done = run_missing(order, store, lambda trial: sessions[trial.workload].run(trial), CONSOLE)
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
    args = tyro.cli(Args).sized()
    if "identity" in args.parts:
        place = Place("server_identity", args.quick)
        result = identity(args.identity, args.engine, place)
        write_json(place.result, result)
        for cell in result["cells"]:
            counts = {key: cell[key] for key in ("temperature", "requests", "lost", "differing", "tokens")}
            CONSOLE.print(counts, f"{len(cell['in_flight_at_swaps'])} swaps", highlight=False)
    if "overhead" in args.parts:
        place = Place("server_overhead", args.quick)
        result = overhead(args.overhead, args.engine, place)
        write_json(place.result, result)
        for entry in result["entries"]:
            ratio = statistics.Interval(**entry["http_over_engine"]).text(3, "x")
            CONSOLE.print(f"{entry['controller']}: HTTP over engine {ratio}", highlight=False)
    if "sweep" in args.parts:
        place = Place("server", args.quick)
        result = sweep(args.sweep, args.engine, place)
        write_json(place.result, result)
        with rc_context(plotting.STYLE):
            plots.throughput(result).savefig(place.result.with_suffix(".png"), bbox_inches="tight")
        CONSOLE.print(f"{place.result} is written", highlight=False)


if __name__ == "__main__":
    main(script)
