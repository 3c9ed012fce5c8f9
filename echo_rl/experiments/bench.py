"""Compares controllers on the same prompts at several concurrencies, so that machine noise cancels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller, MakeController, Request, SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.experiments.arms import Arms
from echo_rl.experiments.plan import BenchConfig, Load, Run
from echo_rl.experiments.report import tables
from echo_rl.experiments.report.bench import report
from echo_rl.experiments.run import run_missing
from echo_rl.experiments.targets.backend import Target
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.workloads.datasets import Prompt, PromptSet
from echo_rl.workloads.records import RunRecord
from echo_rl.workloads.requests import BenchEngine, chat_requests, fitting

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
    target = Target("live", engine, (), clock)
    loads = {load.workload: load for load in config.loads}

    def serve(controller: Controller, load: Load, block: int, asked: Sequence[Prompt] = prompts) -> RunRecord:
        return target.serve(controller, block_requests(engine, asked, config, load, block), load.concurrency)

    def warm_up(controller: Controller, workload: str) -> Controller:
        load = loads[workload]
        few = min(load.concurrency, WARMUP_REQUESTS)
        short = [replace(prompt, max_new_tokens=WARMUP_TOKENS) for prompt in prompts]
        serve(controller, replace(load, requests=few), 0, short)
        return controller

    environment = dict(environment or machine())
    arms = Arms(config.arms, loads, make_controller, warm_up)
    store = bench_store(out, config, {**environment, **arms.made_of})
    done = run_missing(config.runs, store, lambda run: serve(arms.ready(run), loads[run.workload], run.block), console)
    result = report(config, done, environment)
    write_json(out / "result.json", result)
    return result


def bench_store(out: Path, config: BenchConfig, environment: Mapping[str, str]) -> ResultStore[Run, RunRecord]:
    """The folder of a benchmark, whose lines name a workload by its concurrency. Raises `ConfigError`."""
    loads = {load.workload: load.concurrency for load in config.loads}

    def key(run: Run) -> dict[str, Any]:
        return {"block": run.block, "concurrency": loads[run.workload], "arm": run.arm}

    return ResultStore.in_folder(out, config, environment, RunRecord, key)


def bench_model(
    engine_config: EngineConfig, config: BenchConfig, chosen: PromptSet, out: Path, console: Console
) -> dict[str, Any]:
    """Loads the engine, runs what `out` lacks, writes the JSON and the plots there, prints the table.

    Says which of the chosen prompts don't fit the engine's context. Raises `ConfigError` where none does.
    """
    from echo_rl.controllers import registry
    from echo_rl.experiments.report import plots
    from echo_rl.runtime.environment import load_engine
    from echo_rl.utils import terminal

    with console.status("loading the model"):
        engine, environment = load_engine(engine_config)
    longest = max(load.max_new_tokens for load in config.loads)
    chosen = fitting(engine, chosen, longest, max(load.requests * load.blocks for load in config.loads))
    terminal.say(console, chosen.notes)
    environment = {**environment, **chosen.facts}
    result = run_bench(engine, config, chosen.prompts, registry.make, out, environment, console)
    console.print(tables.bench(result, console.width))
    paths = [out / "result.json", *plots.draw(result, out)]
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return result
