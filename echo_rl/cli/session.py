"""Loads an engine, measures its costs, runs a benchmark on it and shows that: what commands and scripts share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo_rl.config import EngineConfig

if TYPE_CHECKING:
    from rich.console import Console

    from echo_rl.calibrate.cost import Grid
    from echo_rl.costs.profile import CostProfile
    from echo_rl.experiments.plan import BenchConfig
    from echo_rl.runtime.engine import Engine


def run_and_show(engine_config: EngineConfig, config: BenchConfig, out: Path, console: Console) -> dict[str, Any]:
    """Loads the engine, runs what `out` lacks, writes the JSON and the plots there, prints the table."""
    from echo_rl.cli import render
    from echo_rl.controllers import registry
    from echo_rl.experiments.bench import run_bench
    from echo_rl.experiments.report import plots
    from echo_rl.workloads.datasets import load_prompts

    prompts = load_prompts(config.suite, seed=config.seed)
    with console.status("loading the model"):
        engine, environment = load_engine(engine_config)
    result = run_bench(engine, config, prompts, registry.make, out, environment, console)
    console.print(render.table(result, console.width))
    paths = [out / "result.json", *plots.draw(result, out)]
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return result


def load_engine(config: EngineConfig) -> tuple[Engine, dict[str, str]]:
    """The engine, and what its timings depend on. Raises what `Engine.load` raises."""
    from echo_rl.runtime.engine import Engine

    return Engine.load(config), environment_of(config)


def environment_of(config: EngineConfig) -> dict[str, str]:
    """What the timings of such an engine depend on, told without loading it.

    Raises `ConfigError` for a device or format that isn't here, `WeightsError` for a drafter that isn't.
    """
    import torch

    from echo_rl import __version__
    from echo_rl.costs.files import own_or_packaged
    from echo_rl.runtime.device import resolve
    from echo_rl.runtime.models.default_model import resolve_drafter
    from echo_rl.utils.machine import machine
    from echo_rl.utils.result_store import digest

    device, dtype = resolve(config.device, config.dtype)
    drafter = resolve_drafter(config.drafter, config.model)
    return machine(
        version=__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=str(config.threads or torch.get_num_threads()),
        model=config.model,
        drafter=digest(drafter / "model.safetensors") if drafter else "none",
        engine=_settings(config),
        calibration=digest(own_or_packaged("profile.json"), own_or_packaged("gates.json")),
    )


def _settings(config: EngineConfig) -> str:
    """The settings that aren't the default's, in words; without those that an environment gives as they came out."""
    told = ("model", "drafter", "device", "dtype", "threads")
    own = {name: value for name, value in vars(config).items() if name not in told}
    return ", ".join(f"{k} {v}" for k, v in own.items() if v != getattr(EngineConfig, k)) or "default"


def measured_profile(
    engine: Engine, environment: Mapping[str, str], grid: Grid, folder: Path, console: Console
) -> CostProfile:
    """This machine's costs, kept in `folder` with the samples so far. Raises `ConfigError` for samples of another
    machine, engine or grid."""
    from echo_rl.calibrate.cost import Machine
    from echo_rl.calibrate.live import calibrate_cost

    machine = Machine(environment["device"], environment["dtype"], environment["model"], int(environment["threads"]))
    others = ("calibration", *vars(machine))  # passes don't read the first, and the rest is said already
    of = {name: value for name, value in environment.items() if name not in others}
    folder.mkdir(parents=True, exist_ok=True)
    provenance = f"{environment['cpu']}, torch {environment['torch']}"
    profile = calibrate_cost(engine, machine, grid, folder / "samples.json", console, provenance, of)
    profile.save(folder / "profile.json")
    return profile
