"""``echo-rl tune``: the best options of each controller on the training part of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tune:
    """Search the options of controllers on recorded responses, for `echo-rl eval --tuned`; rerun it to go on."""

    controllers: tuple[str, ...] = ()
    """Controllers without options; all by default."""
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    """Loads whose geometric mean of speed-ups is the score."""
    blocks: int = 4
    """Blocks a load that the finalists serve."""
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    cap: int = 24
    """The most candidates of one controller; a larger grid is sampled."""
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``; the small one of the package by default."""
    held_out: float = 0.3
    """Share of the prompts kept for `eval`, which must be given the same."""
    seed: int = 0
    """The seed of the sampled candidates, the requests' order and the noise."""
    out: Path = Path("results/tune")
    """Where ``tuned.json`` goes."""

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.costs.batched_profile import BatchedCostProfile
        from echo_rl.costs.profile import CostProfile
        from echo_rl.experiments.report import tables
        from echo_rl.experiments.tune import TuneConfig, tune
        from echo_rl.replay.trace import Trace

        console = Console()
        config = TuneConfig(self.controllers, self.concurrency, self.blocks, self.requests, self.cap, self.seed)
        train = Trace.of(self.trace).split(self.held_out)[0]
        tuned = tune(config, train, BatchedCostProfile(CostProfile.default()), out=self.out, console=console)
        console.print(tables.tuned(tuned, console.width))
        console.print(f"Written: {self.out / 'tuned.json'}", soft_wrap=True)
        return 0


AnyCommand = Tune
