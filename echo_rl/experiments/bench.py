"""Compares controllers on the same prompts at several concurrencies, so that machine noise cancels.

Runs the units of a `BenchConfig` that the output folder does not hold yet. Knows nothing about
models: it needs an engine, a way to make controllers, and prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo_rl.contracts import Controller, MakeController, Request, SamplingParams
from echo_rl.controllers.arm import Arm
from echo_rl.errors import ConfigError
from echo_rl.experiments.plan import BenchConfig, Load, Unit, schedule
from echo_rl.experiments.report.blocks import arms_made_of, report
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import R, ResultStore, write_json
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.driver import serve
from echo_rl.workloads.records import RunRecord
from echo_rl.workloads.requests import BenchEngine, chat_requests

U = TypeVar("U")
WARMUP_REQUESTS = 4
WARMUP_TOKENS = 8


def block_requests(
    engine: BenchEngine, prompts: Sequence[Prompt], config: BenchConfig, load: Load, block: int
) -> list[Request]:
    """The requests of one block: the same for every arm. Prompts repeat only once all are used."""

    def params(number: int) -> SamplingParams:
        return SamplingParams(
            temperature=config.temperature,
            seed=config.seed + number,
            max_new_tokens=load.max_new_tokens,
            ignore_eos=config.ignore_eos,
        )

    first = block * load.requests
    chosen = [prompts[n % len(prompts)] for n in range(first, first + load.requests)]
    return chat_requests(engine, chosen, params, first)


def run_bench(
    engine: BenchEngine,
    config: BenchConfig,
    prompts: Sequence[Prompt],
    make_controller: MakeController,
    out: Path,
    environment: Mapping[str, str] | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Runs what `out` does not hold yet, writes ``out/result.json`` and returns its content.

    `make_controller(name, **options)` is called once per arm and load, so that an adaptive
    controller keeps what it learnt over the blocks, though not over an interruption. Raises
    `ConfigError` where `out` holds another benchmark, or one of arms made of other files, where an arm can't be made,
    or there are no prompts.
    """
    if not prompts:
        raise ConfigError("there are no prompts to serve")
    runner = _Runner(engine, config, prompts, make_controller, clock)
    environment = dict(environment or machine())
    made = arms_made_of({arm: controller for (arm, _), controller in runner.cold.items()})
    store: ResultStore[Unit, RunRecord] = ResultStore.in_folder(out, config, {**environment, **made}, RunRecord)
    done = run_missing(list(schedule(config)), store, runner.run, console)
    result = report(config, done, environment)
    write_json(out / "result.json", result)
    return result


def run_missing(
    units: Sequence[U], store: ResultStore[U, R], run: Callable[[U], R], console: Console | None = None
) -> dict[U, R]:
    """All units of the store, those that it lacked run in the order given and added to it. Shows a bar."""
    with _progress(console) as progress:
        task = progress.add_task("", total=len(units), completed=sum(unit in store for unit in units))
        for unit in units:
            if unit not in store:
                progress.update(task, description=str(unit))
                store.add(unit, run(unit))
                progress.advance(task)
    return {unit: store[unit] for unit in units}


class _Runner:
    """Holds the controllers of a run, one per arm and load, each warmed up before its first unit."""

    def __init__(
        self,
        engine: BenchEngine,
        config: BenchConfig,
        prompts: Sequence[Prompt],
        make_controller: MakeController,
        clock: Callable[[], float],
    ) -> None:
        self.engine = engine
        self.config = config
        self.prompts = prompts
        self.clock = clock
        self.loads = {load.concurrency: load for load in config.loads}
        self.cold: dict[tuple[str, int], Controller] = {}
        self.warm: dict[tuple[str, int], Controller] = {}
        for arm in map(Arm.parse, config.arms):
            for concurrency in self.loads:
                self.cold[arm.label, concurrency] = make_controller(arm.controller, **arm.options)

    def run(self, unit: Unit) -> RunRecord:
        key = (unit.arm, unit.concurrency)
        if key in self.cold:
            controller = self.warm[key] = self.cold.pop(key)
            first = Load(unit.concurrency, min(unit.concurrency, WARMUP_REQUESTS), WARMUP_TOKENS, 1)
            self._serve(controller, first, 0)
        return self._serve(self.warm[key], self.loads[unit.concurrency], unit.block)

    def _serve(self, controller: Controller, load: Load, block: int) -> RunRecord:
        requests = block_requests(self.engine, self.prompts, self.config, load, block)
        return serve(self.engine, controller, requests, load.concurrency, clock=self.clock)


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=2)
