"""``echo-rl eval``: controllers ranked on replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from echo_rl.cli.options import RECORDED, EngineOptions, FileFlags
from echo_rl.config import EngineConfig
from echo_rl.workloads.datasets import FileOptions

if TYPE_CHECKING:
    from echo_rl.experiments.evaluate import EvalConfig


@dataclass(frozen=True)
class Eval:
    """Rank controllers on recorded responses in simulated time; rerun it to go on, or to add controllers."""

    controllers: tuple[str, ...] = ()
    """Controllers, options as ``echo:name=value,name=value``; all by default."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Requests in flight, one load each."""
    blocks: int = 8
    """Blocks a load; intervals come from resampling them."""
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``; the small one of the package by default. With ``--prompts``
    responses to those are recorded first, in the folder ``recorded`` of ``--out``."""
    held_out: float = 0.3
    """Share of the prompts that is served; the rest is for `tune` and `train`. 0 serves all."""
    profile: Path | None = None
    """A cost profile of ``echo-rl calibrate`` (cost or roofline); this machine's own or the packaged one by default."""
    seed: int = 0
    """The seed of the requests' order and of the noise of step times."""
    tuned: Path | None = None
    """A ``tuned.json`` of ``echo-rl tune``: controllers named without options take theirs from it."""
    hindsight: bool = False
    """Also search the best fixed plan of each load."""
    full: bool = False
    """Print tokens/s, speed-ups with intervals and MAT of every load, too."""
    out: Path = Path("results/eval")
    """The folder of the cells, ``result.json`` and ``speedup.png``."""
    files: FileFlags = field(default_factory=FileOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)
    """The engine that records responses to ``--prompts``."""

    def run(self) -> int:
        from echo_rl.controllers import registry
        from echo_rl.costs.batched_profile import BatchedCostProfile
        from echo_rl.costs.profile import CostProfile
        from echo_rl.experiments.evaluate import evaluate
        from echo_rl.experiments.report import tables
        from echo_rl.replay.live import trace_of
        from echo_rl.utils import terminal

        console = terminal.console()
        config = self.config()
        served = trace_of(self.engine, self.trace, self.files, self.out / RECORDED, console).split(self.held_out)[1]
        profile = CostProfile.of(self.profile)
        result = evaluate(config, served, BatchedCostProfile(profile), registry.planning_by(profile), self.out, console)
        console.print(tables.ranking(result, console.width))
        if self.full:
            console.print(tables.by_load(result, console.width))
        for arm, reason in result["left_out"].items():
            console.print(f"Left out: {arm}: {reason}", style="yellow", highlight=False)
        console.print(f"Written: {self.out / 'result.json'}, {self.out / 'speedup.png'}", soft_wrap=True)
        return 0

    def config(self) -> EvalConfig:
        """Raises `ConfigError`."""
        from echo_rl.controllers import registry
        from echo_rl.experiments.evaluate import EvalConfig
        from echo_rl.experiments.tune import load_tuned

        tuned = load_tuned(self.tuned) if self.tuned else {}
        arms = tuple(tuned.get(name, name) for name in self.controllers or registry.names())
        return EvalConfig(
            arms=arms, concurrency=self.concurrency, blocks=self.blocks, requests=self.requests, seed=self.seed,
            hindsight=self.hindsight,
        )  # fmt: skip
