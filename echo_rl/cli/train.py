"""``echo-rl train``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from echo_rl.cli.options import RECORDED, EngineOptions, FileFlags
from echo_rl.config import EngineConfig
from echo_rl.learning.train import TrainConfig, train
from echo_rl.workloads.datasets import FileOptions


@dataclass(frozen=True)
class Train:
    """Train a policy on replayed servers; rerun it to go on where it stopped.

    With ``--prompts`` responses to those are recorded first, in the folder ``recorded`` of ``--out``.
    """

    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    files: FileFlags = field(default_factory=FileOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)
    """The engine that records responses to ``--prompts``."""

    def run(self) -> int:
        from echo_rl.replay.live import trace_of
        from echo_rl.utils import terminal

        console, options = terminal.console(), self.options
        if self.files.prompts:
            folder = options.out / RECORDED
            trace_of(self.engine, options.trace, self.files, folder, console)
            options = replace(options, trace=folder / "trace.safetensors")
        done = train(options, console)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in done.best.items() if "/" not in name)
        console.print(f"{done.policy}: {scores}; on {done.machine}", soft_wrap=True)
        return 0
