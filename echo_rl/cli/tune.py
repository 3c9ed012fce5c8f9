"""``echo-rl tune``: the best options of each controller on the training part of a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from echo_rl.cli.options import RECORDED, EngineOptions, FileFlags
from echo_rl.config import EngineConfig
from echo_rl.experiments.tune import TuneConfig, tune
from echo_rl.workloads.datasets import FileOptions


@dataclass(frozen=True)
class Tune:
    """Search the options of controllers on recorded responses, for `echo-rl eval --tuned`; rerun it to go on."""

    search: Annotated[TuneConfig, tyro.conf.arg(name="")] = field(default_factory=TuneConfig)
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``; the small one of the package by default. With ``--prompts``
    responses to those are recorded first, in the folder ``recorded`` of ``--out``."""
    held_out: float = 0.3
    """Share of the prompts kept for `eval`, which must be given the same."""
    out: Path = Path("results/tune")
    """The folder of ``tuned.json``."""
    files: FileFlags = field(default_factory=FileOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)
    """The engine that records responses to ``--prompts``."""

    def run(self) -> int:
        from echo_rl.costs.batched_profile import BatchedCostProfile
        from echo_rl.costs.profile import CostProfile
        from echo_rl.experiments.report import tables
        from echo_rl.replay.live import trace_of
        from echo_rl.utils import terminal

        console = terminal.console()
        train = trace_of(self.engine, self.trace, self.files, self.out / RECORDED, console).split(self.held_out)[0]
        tuned = tune(self.search, train, BatchedCostProfile(CostProfile.default()), out=self.out, console=console)
        console.print(tables.tuned(tuned, console.width))
        console.print(f"Written: {self.out / 'tuned.json'}", soft_wrap=True)
        return 0
