"""``echo-rl calibrate``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from echo_rl.calibrate.cost import Grid
from echo_rl.calibrate.gates import GateOptions
from echo_rl.cli.options import EngineOptions, FileFlags
from echo_rl.config import EngineConfig
from echo_rl.costs.files import calibrated
from echo_rl.costs.roofline.hardware import Assumptions
from echo_rl.costs.roofline.timing import Dtype
from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets import FileOptions

OUT = calibrated("")


@dataclass(frozen=True)
class Cost:
    """Measure what verifying and drafting cost on this machine; rerun it to go on where it stopped.

    What has been measured is kept in the folder's ``samples.json``, or of steps on the device in
    ``samples-device.json``: delete that to measure anew.

    Controllers use the result from then on if it lies in the default folder; else name it, as in
    ``echo:profile=FILE``.
    """

    out: Path = OUT
    """Folder of ``profile.json``, of its plot and of the samples so far."""
    grid: Annotated[Grid, tyro.conf.arg(name="")] = field(default_factory=Grid)
    engine: EngineOptions = field(default_factory=lambda: EngineConfig(kv_tokens=65_536))

    def run(self) -> int:
        from echo_rl.calibrate import figures
        from echo_rl.calibrate.live import measured_profile
        from echo_rl.calibrate.tables import knee_table
        from echo_rl.runtime.environment import load_engine
        from echo_rl.utils import terminal

        console = terminal.console()
        profile = measured_profile(*load_engine(self.engine), self.grid, self.out, console)
        figures.save(figures.cost(profile), self.out / "cost.png")
        console.print(knee_table(profile, console.width))
        console.print(f"Written: {self.out / 'profile.json'}, {self.out / 'cost.png'}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Gates:
    """Find the depths at which confidence tells good paths from bad, where to cut, and how often that misjudges.

    Observes answers to prompts of the package's own, which no benchmark has, or to yours (``--prompts``).
    Controllers use the result from then on if it lies in the default folder; else name it, as in
    ``echo:calibration=FILE``.
    """

    out: Path = OUT
    """Folder of ``gates.json`` and of its plot."""
    max_new_tokens: int = 96
    """The most tokens that are generated for a prompt."""
    options: Annotated[GateOptions, tyro.conf.arg(name="")] = field(default_factory=GateOptions)
    data: FileFlags = field(default_factory=FileOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from echo_rl.calibrate import figures
        from echo_rl.calibrate.live import calibrate_gates, own_prompts
        from echo_rl.calibrate.tables import gate_table
        from echo_rl.runtime.engine import Engine
        from echo_rl.utils import terminal

        console = terminal.console()
        chosen = self.data.load_files() if self.data.prompts else own_prompts(self.data.limit)
        gates = calibrate_gates(Engine.load(self.engine), self.options, chosen, self.max_new_tokens, console)
        self.out.mkdir(parents=True, exist_ok=True)
        gates.save(self.out / "gates.json")
        figures.save(figures.judgement(gates), self.out / "gates.png")
        console.print(gate_table(gates, console.width))
        console.print(f"Written: {self.out / 'gates.json'}, {self.out / 'gates.png'}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Roofline:
    """Model the costs of a GPU that you don't have: published peaks, model sizes and stated assumptions.

    Nothing is measured, and whatever uses the result says so. Name the file where it is to be used, as in
    ``echo-rl eval --profile FILE`` or ``echo:profile=FILE``.
    """

    hardware: str
    """``h100``, ``h200`` or ``mi300x``."""
    model: str
    """``llama-3.1-8b``, ``llama-3.3-70b`` or ``qwen3-235b-a22b``."""
    out: Path
    """The profile's file. It may not be this machine's own."""
    tp: int = 1
    """GPUs that share the model."""
    dtype: Dtype = "bfloat16"
    """The format of the weights and of the arithmetic; the KV cache stays bf16."""
    assumed: Annotated[Assumptions, tyro.conf.arg(name="")] = field(default_factory=Assumptions)

    def run(self) -> int:
        from echo_rl.calibrate.tables import knee_table
        from echo_rl.costs.roofline.surface import modelled_profile, roofline
        from echo_rl.utils import terminal

        if self.out.resolve() == calibrated("profile.json").resolve():
            raise ConfigError(f"{self.out} is where this machine's measured costs belong; give another --out")
        profile = modelled_profile(roofline(self.hardware, self.model, self.tp, self.dtype, self.assumed))
        profile.save(self.out)
        console = terminal.console()
        console.print(knee_table(profile, console.width))
        console.print(profile.provenance, soft_wrap=True, highlight=False)
        console.print(f"Written: {self.out}", soft_wrap=True)
        return 0


AnyCommand = (
    Annotated[Cost, tyro.conf.subcommand("cost")]
    | Annotated[Gates, tyro.conf.subcommand("gates")]
    | Annotated[Roofline, tyro.conf.subcommand("roofline")]
)
