"""``echo-rl calibrate``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echo_rl.calibrate.cost import Grid
from echo_rl.calibrate.gates import GateOptions
from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig

OUT = Path("calibration")


@dataclass(frozen=True)
class Cost:
    """Measure what verifying and drafting cost on this machine; rerun it to go on where it stopped."""

    out: Path = OUT
    """Folder of ``profile.json`` and of the samples so far."""
    grid: Annotated[Grid, tyro.conf.arg(name="")] = field(default_factory=Grid)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.calibrate.cost import Machine, measure
        from echo_rl.cli.session import load_engine
        from echo_rl.runtime.probe import Probe

        console = Console()
        engine, environment = load_engine(self.engine)
        machine = Machine(environment["device"], environment["dtype"], self.engine.model, int(environment["threads"]))
        self.out.mkdir(parents=True, exist_ok=True)
        probe = Probe(engine)
        samples = self.out / "samples.json"
        provenance = f"{environment['cpu']}, torch {environment['torch']}"
        profile = measure(probe.verify, probe.draft, machine, self.grid, samples, console, provenance)
        profile.save(self.out / "profile.json")
        for batch in self.grid.batches:
            console.print(f"batch {batch}: knee at {profile.knee(batch)} nodes", highlight=False)
        console.print(f"Written: {self.out / 'profile.json'}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Gates:
    """Find the depths at which confidence tells good paths from bad, and where to cut, on real prompts."""

    out: Path = OUT
    """Folder of ``gates.json``."""
    suite: Literal["all", "mt_bench", "humaneval", "gsm8k"] = "all"
    """Which prompts are observed."""
    requests: int = 64
    """How many of them."""
    max_new_tokens: int = 96
    """Most tokens a request."""
    concurrency: int = 8
    """Requests in flight."""
    controller: str = "eagle3:depth=8"
    """Who speculates meanwhile; it should draft as deep as the gates reach, without gates of its own."""
    options: Annotated[GateOptions, tyro.conf.arg(name="")] = field(default_factory=GateOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.bench import block_requests
        from echo_rl.calibrate.gates import calibrate
        from echo_rl.cli.live_calibration import observe_gates
        from echo_rl.cli.session import load_engine
        from echo_rl.controllers import registry
        from echo_rl.prompts import load_prompts
        from echo_rl.sweep import Arm, BenchConfig, Load

        console = Console()
        arm = Arm.parse(self.controller)
        controller = registry.make(arm.controller, **arm.options)
        load = Load(self.concurrency, self.requests, self.max_new_tokens, blocks=1)
        config = BenchConfig((self.controller,), (load,), suite=self.suite, seed=self.options.seed)
        prompts = load_prompts(self.suite, seed=config.seed)
        engine, environment = load_engine(self.engine)
        with console.status(f"serving {self.requests} prompts"):
            requests = block_requests(engine, prompts, config, load, 0)
            observations = observe_gates(engine, controller, requests, self.concurrency)
        provenance = f"{self.requests} prompts of {self.suite}, {environment['model']}, {environment['drafter']}"
        calibration = calibrate(observations, self.options, provenance)
        self.out.mkdir(parents=True, exist_ok=True)
        calibration.save(self.out / "gates.json")
        console.print(f"Written: {self.out / 'gates.json'}, from {len(observations)} observations", soft_wrap=True)
        return 0


AnyCommand = Annotated[Cost, tyro.conf.subcommand("cost")] | Annotated[Gates, tyro.conf.subcommand("gates")]
