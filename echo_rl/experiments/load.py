"""Runs a load test block by block, each arm on the same prompts, seeds and arrivals; goes on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from echo_rl.experiments.plan import Run
from echo_rl.experiments.report.load import report
from echo_rl.experiments.run import run_missing
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.experiments.targets.http.target import HttpTarget, Keys
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.utils.terminal import say
from echo_rl.workloads.arrivals import facts as arrival_facts
from echo_rl.workloads.datasets import Prompt


def run_load(
    config: LoadConfig,
    prompts: Sequence[Prompt],
    out: Path,
    keys: Keys,
    console: Console | None = None,
    facts: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[Run, LoadRecord]]:
    """Runs what `out` lacks, writes ``out/result.json``; returns its content and all records. `facts` tell the prompts
    from others.

    A server whose controllers are compared gets back the one that it had. Raises `ConfigError` where a
    server can't be reached or serves no token, or where `out` holds another load test.
    """
    target = HttpTarget(config, prompts, keys)
    environment = machine(models=", ".join(target.models.values())) | dict(facts or {})
    environment |= arrival_facts(target.workloads.values())
    if console is not None:
        say(console, target.remarks)
    store: ResultStore[Run, LoadRecord] = ResultStore.in_folder(out, config, environment, LoadRecord)
    try:
        done = run_missing(config.runs, store, target.run, console)
    finally:
        target.restore()
    result = report(config, target.workloads, done, environment)
    write_json(out / "result.json", result)
    return result, done
