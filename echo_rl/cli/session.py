"""Runs a benchmark on a live engine and shows it: what `bench` and `demo` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rl.config import EngineConfig

if TYPE_CHECKING:
    from rich.console import Console

    from echo_rl.sweep import BenchConfig


def run_and_show(engine_config: EngineConfig, config: BenchConfig, out: Path, console: Console) -> dict[str, Any]:
    """Loads the engine, runs what `out` lacks, writes the JSON and the plots there, prints the table."""
    from echo_rl import plots
    from echo_rl.bench import run_bench
    from echo_rl.cli import render
    from echo_rl.controllers import registry
    from echo_rl.prompts import load_prompts

    prompts = load_prompts(config.suite, seed=config.seed)
    with console.status("loading the model"):
        engine, environment = load_engine(engine_config)
    result = run_bench(engine, config, prompts, registry.make, out, environment, console)
    console.print(render.table(result, console.width))
    paths = [out / "result.json", *plots.draw(result, out)]
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return result


def load_engine(config: EngineConfig) -> tuple[Any, dict[str, str]]:
    """The engine, and what its timings depend on."""
    import torch

    from echo_rl import __version__
    from echo_rl.results import machine
    from echo_rl.runtime.device import resolve
    from echo_rl.runtime.engine import Engine

    device, dtype = resolve(config.device, config.dtype)
    engine = Engine.load(config)
    environment = machine(
        version=__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=str(torch.get_num_threads()),
        model=config.model,
        drafter=str(config.drafter),
    )
    return engine, environment
