"""``echo-rl tune``: the best options of each controller on the training part of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


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
    """Most candidates of one controller; a larger grid is sampled."""
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``; the small one of the package by default."""
    held_out: float = 0.3
    """Share of the prompts kept for `eval`, which must be given the same."""
    seed: int = 0
    """Of the sampled candidates, the requests' order and the noise."""
    out: Path = Path("results/tune")
    """Where ``tuned.json`` goes."""

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.cli.evaluate import load_trace
        from echo_rl.costs.batched_profile import BatchedCostProfile
        from echo_rl.costs.profile import CostProfile
        from echo_rl.experiments.tune import TuneConfig, tune

        console = Console()
        config = TuneConfig(self.controllers, self.concurrency, self.blocks, self.requests, self.cap, self.seed)
        trace = load_trace(self.trace)
        train = trace.split(self.held_out)[0]
        tuned = tune(config, train, BatchedCostProfile(CostProfile.default()), out=self.out, console=console)
        console.print(table(tuned))
        console.print(f"Written: {self.out / 'tuned.json'}", soft_wrap=True)
        return 0


def table(tuned: Mapping[str, Any]) -> Table:
    """One row a controller, best score first."""
    from rich.table import Table

    view = Table(title="Geometric mean over loads of the speed-up over none", title_justify="left")
    view.add_column("controller")
    view.add_column("best options", overflow="fold")
    for name in ("tuned", "defaults", "tried"):
        view.add_column(name, justify="right")
    for name, row in sorted(tuned.items(), key=lambda item: -(item[1]["score"] or 0.0)):
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items()) or "defaults"
        scores = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("score", "default_score"))
        view.add_row(name, options, *scores, str(row["tried"]))
    return view


AnyCommand = Tune
