"""Throughput of every controller, ablations included, against concurrency on real prompts.

Prompts of other suites than the mix that things are tuned on, as ``--suite held_out``, have a result of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import tyro

from benchmarks.common import CONSOLE, EngineOptions, Place, main
from echo_rl.config import EngineConfig
from echo_rl.controllers import registry
from echo_rl.experiments.bench import run_bench
from echo_rl.experiments.plan import BenchConfig, Load
from echo_rl.experiments.report import plots, tables
from echo_rl.runtime.environment import load_engine
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import load_prompts

ARMS = ("none", "chain", "eagle3", "adaspec:depth=8,width=3", "echo", "ppo")


@dataclass(frozen=True)
class Args:
    """Sweep controllers over concurrencies."""

    quick: bool = False
    """Three arms, two loads, two blocks."""
    suite: str = "all"
    """A built-in suite, the mix of those that things are tuned on (``all``), or of the others (``held_out``)."""
    arms: tuple[str, ...] = ARMS
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    blocks: int = 4
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    max_new_tokens: int = 96
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        if not self.quick:
            return self
        return replace(
            self, arms=("none", "eagle3", "echo"), concurrency=(1, 8), blocks=2, requests=2, max_new_tokens=24
        )

    def config(self) -> BenchConfig:
        loads = tuple(Load(c, max(self.requests, 2 * c), self.max_new_tokens, self.blocks) for c in self.concurrency)
        return BenchConfig(self.arms, loads, suite=self.suite, seed=self.seed)


def script() -> None:
    args = tyro.cli(Args).sized()
    mixed = args.suite == "all"
    place, config = Place("throughput" if mixed else f"throughput_{args.suite}", args.quick), args.config()
    prompts = load_prompts(args.suite, seed=args.seed)
    engine, environment = load_engine(args.engine)
    result = run_bench(engine, config, prompts, registry.make, place.work, environment, CONSOLE)
    write_json(place.result, result)
    plots.draw(result, place.result.parent if mixed else place.work)
    CONSOLE.print(tables.bench(result, CONSOLE.width), tables.equality(result)[1])


if __name__ == "__main__":
    main(script)
