"""Two controllers against each other: paired blocks, interleaved A B B A, on replay, on the live engine or both.

``run_ab(...)`` writes ``ab.json`` and ``ab.html`` into its folder, and what each target needs to go on
after an interruption into a folder of its own there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from echo_rl.contracts import Controller, MakeController
from echo_rl.controllers.wrappers.fitted import FittedController
from echo_rl.errors import ConfigError
from echo_rl.experiments.arms import Arms
from echo_rl.experiments.plan import AbConfig, Run
from echo_rl.experiments.report.ab import target_result
from echo_rl.experiments.report.html import ab_page
from echo_rl.experiments.run import run_missing
from echo_rl.experiments.targets.backend import Target
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.utils.terminal import say
from echo_rl.workloads.arrivals import facts
from echo_rl.workloads.records import RunRecord
from echo_rl.workloads.requests import seed_of

WARMUP_STEPS = 20


def run_ab(
    targets: Sequence[Target],
    config: AbConfig,
    make: MakeController,
    out: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what `out` lacks, writes the result and the report there, and returns the result.

    The first arm of the config is A, the second B; ratios are B over A. Raises `ConfigError` where
    there are not two arms, an arm or a workload can't be made, or `out` holds another comparison.
    """
    if len(config.arms) != 2:
        raise ConfigError(f"an A/B comparison has two arms, not {len(config.arms)}; `eval` ranks any number")
    if not targets:
        raise ConfigError("an A/B comparison needs a target: replay or live")
    found = []
    for target in targets:
        runs = run_on(target, config, make, out / target.name, console)
        found.append(target_result(target, config, runs))
    result = {"a": config.arms[0], "b": config.arms[1], "config": asdict(config), "venues": found}
    write_json(out / "ab.json", result)
    (out / "ab.html").write_text(ab_page(result))
    return result


def run_on(
    target: Target, config: AbConfig, make: MakeController, out: Path, console: Console | None = None
) -> dict[Run, RunRecord]:
    """Every run of the config; those that `out` lacks are run now and stored there.

    In a block every arm meets the same requests in the same order, the same arrivals and, on replay, the same noise,
    so that what differs is what the controllers decided. Raises `ConfigError` where `out` holds another comparison, or
    an arm or a workload can't be made.
    """
    workloads = {text: target.workload(text) for text in config.workloads}

    def warm_up(controller: Controller, workload: str) -> Controller:
        fitted = FittedController(controller, target.depth, target.width)
        target.drive(fitted, workloads[workload], seed_of(config.seed, workload, "warm-up"), steps=WARMUP_STEPS)
        return fitted

    arms = Arms(config.arms, workloads, make, warm_up)

    def serve(run: Run) -> RunRecord:
        workload, seed = workloads[run.workload], seed_of(config.seed, run.workload, run.block)
        controller = arms.ready(run)
        record = target.drive(controller, workload, seed, config.steps, config.seconds, f"{run.block}.")
        if not record.output_tokens:
            raise ConfigError(
                f"no token came in {run} within {record.seconds:.1f} s; give blocks more seconds or steps"
            )
        return record

    if console is not None:
        say(console, [remark for workload in workloads.values() for remark in target.remarks(workload)])
    environment = {**target.environment, **arms.made_of, **facts(workloads.values())}
    store: ResultStore[Run, RunRecord] = ResultStore.in_folder(out, config, environment, RunRecord)
    return run_missing(config.runs, store, serve, console)
