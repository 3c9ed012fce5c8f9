"""Shows within minutes what speculation gains on a machine, alone and under load, on the same real prompts.

Every block serves the same prompts to the same length under each arm, so that a ratio compares equal work. How much
work a block is, and how many there are, follows from a short trial of this machine and the time that is allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from echo_rl.config import EngineConfig
from echo_rl.contracts import MakeController
from echo_rl.errors import ConfigError
from echo_rl.experiments.arms import make_arm
from echo_rl.experiments.bench import block_requests
from echo_rl.experiments.plan import BenchConfig, Load, Run
from echo_rl.experiments.report import tables
from echo_rl.experiments.report.bench import report
from echo_rl.experiments.report.measures import decoding_rates
from echo_rl.experiments.run import shown
from echo_rl.utils.result_store import write_json
from echo_rl.utils.statistics import Interval
from echo_rl.workloads.datasets import Prompt, PromptSet
from echo_rl.workloads.driver import serve
from echo_rl.workloads.records import RunRecord
from echo_rl.workloads.requests import BenchEngine, fitting

ARMS = ("none", "eagle3", "echo")
SHAPES = {1: (3, 2), 16: (16, 1)}
"""By how many requests are in flight: those of a block, and how many times the tokens of `Fit` each of them has. A lone
request is cheap, and few of its steps say little."""
TRIAL_TOKENS = 6
TOKENS = (8, 48)
"""The fewest and the most tokens of a request in the largest batch."""
BLOCKS = (3, 10)
"""The fewest and the most blocks; of fewer an interval says nothing."""
AIM = 6
"""Blocks for which requests are made as long as the time allows: fewer make wide intervals, more short requests."""
PROMPT_TOKENS = 128
"""The longest prompt: reading prompts takes time, and the rates are of decoding."""
WIDE = 0.15
"""The part of an estimate beyond which an interval is called wide."""


@dataclass(frozen=True)
class Fit:
    """The work that suits a machine: tokens of a request and blocks."""

    tokens: int
    blocks: int

    @classmethod
    def of(cls, trial: Sequence[RunRecord], seconds: float) -> Fit:
        """What fits so many seconds, by what a block of `TRIAL_TOKENS` took under each arm and load."""
        steps = [step for run in trial for step in run.steps]
        reading = sum(step.seconds for step in steps if step.prefill_tokens)
        token = (sum(run.busy_seconds for run in trial) - reading) / (TRIAL_TOKENS - 1)  # the first comes from reading
        tokens = _within(TOKENS, 1 + (seconds / AIM - reading) / token) if token else TOKENS[1]
        block = reading + (tokens - 1) * token
        return cls(tokens, _within(BLOCKS, seconds / block) if block else BLOCKS[1])

    @property
    def config(self) -> BenchConfig:
        loads = tuple(Load(each, count, times * self.tokens, self.blocks) for each, (count, times) in SHAPES.items())
        return BenchConfig(ARMS, loads, ignore_eos=True)


def run_demo(
    engine: BenchEngine,
    prompts: Sequence[Prompt],
    make: MakeController,
    seconds: float,
    environment: Mapping[str, str],
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The result of a benchmark whose rates are `decoding_rates`, measured within so many seconds of the clock.

    Once a machine turns out slower than in the trial, the blocks that no longer fit are left out. Raises `ConfigError`
    where there is no time or there are no prompts.
    """
    if not 0.0 < seconds < float("inf") or not prompts:
        raise ConfigError(f"a demo of {seconds:g} s on {len(prompts)} prompts shows nothing; give seconds and prompts")
    end = clock() + seconds
    trial = Fit(TRIAL_TOKENS, 1).config
    controllers = {(run.arm, run.workload): make_arm(make, run.arm) for run in trial.runs}

    def measured(config: BenchConfig, run: Run) -> RunRecord:
        load = next(load for load in config.loads if load.workload == run.workload)
        requests = block_requests(engine, prompts, config, load, run.block)
        return serve(engine, controllers[run.arm, run.workload], requests, load.concurrency, clock=clock)

    with console.status("trying how fast this machine is") if console else nullcontext():
        tried = [measured(trial, replace(run, block=BLOCKS[1])) for run in trial.runs]  # on other prompts
    config = Fit.of(tried, end - clock()).config
    done: dict[Run, RunRecord] = {}
    begun, longest = clock(), 0.0
    with shown(config.runs, console) as runs:
        for run in runs:
            if run not in done and _begins(run, done):
                longest, begun = max(longest, clock() - begun), clock()
                if run.block >= BLOCKS[0] and begun + longest > end:
                    break
            done[run] = measured(config, run)
    loads = tuple(replace(load, blocks=max(run.block for run in done) + 1) for load in config.loads)
    return report(replace(config, loads=loads), done, environment, decoding_rates)


def demo_model(
    engine_config: EngineConfig, chosen: PromptSet, seconds: float, out: Path, console: Console
) -> dict[str, Any]:
    """Loads the engine, runs the demo, writes the JSON and the plots into `out`, prints what was found."""
    from echo_rl.controllers import registry
    from echo_rl.experiments.report import plots
    from echo_rl.runtime.environment import load_engine

    with console.status("loading the model"):
        engine, environment = load_engine(engine_config)
    loads = Fit(TOKENS[1], BLOCKS[1] + 1).config.loads  # and the trial's block
    longest, most = max(load.max_new_tokens for load in loads), max(load.requests * load.blocks for load in loads)
    short = [p for p in chosen.prompts if len(engine.tokenizer.chat(list(p.messages))) <= PROMPT_TOKENS]
    prompts = fitting(engine, replace(chosen, prompts=short), longest, most).prompts
    result = run_demo(engine, prompts, registry.make, seconds, {**environment, **chosen.facts}, console)
    write_json(out / "result.json", result)
    console.print(tables.bench(result, console.width))
    for line in remarks(result):
        console.print(line, highlight=False)
    first, *others = plots.draw(result, out)
    console.print(f"Plot: {first}", soft_wrap=True)
    console.print("Written: " + ", ".join(str(path) for path in (out / "result.json", *others)), soft_wrap=True)
    return result


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What the numbers are of, and which intervals are wide."""
    loads = result["config"]["loads"]
    tokens = ", ".join(f"{load['max_new_tokens']} at {load['concurrency']} in flight" for load in loads)
    lines = [
        f"{loads[0]['blocks']} blocks, the same prompts for each controller; tokens a request: {tokens}. "
        f"Rates are of steps that decode all requests in flight, without the reading of prompts (the mix's, of at most "
        f"{PROMPT_TOKENS} tokens)."
    ]
    if wide := [f"{cell['arm']} at {cell['concurrency']}" for cell in result["cells"] if _is_wide(cell)]:
        lines.append(
            f"Intervals wider than ±{WIDE:.0%}: {', '.join(wide)}. The time was too short for this machine, or others "
            "used it too; give more --seconds, or measure thoroughly with `echo-rl bench`."
        )
    return lines


def _is_wide(cell: Mapping[str, Any]) -> bool:
    found = (Interval(**cell[name]) for name in ("throughput", "speedup") if cell[name])
    return any(max(_distance(each.estimate, end) for end in (each.low, each.high)) > WIDE for each in found)


def _distance(estimate: float, end: float | None) -> float:
    return float("inf") if end is None else abs(end / estimate - 1.0)


def _begins(run: Run, done: Mapping[Run, RunRecord]) -> bool:
    """True where no run of that block is done."""
    return all(other.block != run.block for other in done)


def _within(bounds: tuple[int, int], value: float) -> int:
    low, high = bounds
    return int(min(max(value, low), high))
