"""Mean accepted tokens (MAT) of the drafter, suite by suite (also those held out), greedy: a chain, and a tree of 60
nodes.

MAT does not depend on the machine or, decoding being lossless, on the batch; requests are served
several at a time only to be done sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import CONSOLE, EngineOptions, Place, main
from echo_rl.config import EngineConfig
from echo_rl.controllers import registry
from echo_rl.experiments.bench import bench_store, run_bench
from echo_rl.experiments.plan import BenchConfig, Load, Run
from echo_rl.runtime.environment import load_engine
from echo_rl.utils import statistics
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import SUITES, load_prompts
from echo_rl.workloads.driver import RunRecord
from echo_rl.workloads.requests import BenchEngine


@dataclass(frozen=True)
class Args:
    """Measure the drafter's acceptance on each suite."""

    quick: bool = False
    """Two blocks of four prompts."""
    chain: str = "chain:steps=5"
    tree: str = "eagle3:total=60"
    concurrency: int = 8
    requests: int = 8
    """Prompts a block."""
    blocks: int = 5
    max_new_tokens: int = 96
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        return replace(self, requests=4, blocks=2, max_new_tokens=24) if self.quick else self

    def config(self, suite: str) -> BenchConfig:
        load = Load(self.concurrency, self.requests, self.max_new_tokens, self.blocks)
        return BenchConfig((self.chain, self.tree), (load,), suite=suite, seed=self.seed)


def measure(
    args: Args, suite: str, engine: BenchEngine, environment: Mapping[str, str], work: Path
) -> list[dict[str, Any]]:
    """One entry per arm: MAT with its interval over blocks, and acceptance by depth."""
    config, out = args.config(suite), work / suite
    result = run_bench(engine, config, load_prompts(suite, seed=args.seed), registry.make, out, environment, CONSOLE)
    records = bench_store(out, config, environment)
    return [
        {
            "suite": suite,
            "held_out": SUITES[suite].held_out,
            "arm": cell["arm"],
            "mat": asdict(mat([records[Run(b, config.loads[0].workload, cell["arm"])] for b in range(args.blocks)])),
            "acceptance_by_depth": cell["acceptance_by_depth"],
            "requests": cell["requests"],
            "tokens": cell["output_tokens"],
        }
        for cell in result["cells"]
    ]


def mat(blocks: list[RunRecord]) -> statistics.Interval:
    """Committed tokens per decoding request-step, resampling blocks."""
    totals = [(sum(s.committed for s in block.steps), sum(s.batch_size for s in block.steps)) for block in blocks]
    return statistics.rate([statistics.Rate(committed, rows) for committed, rows in totals])


def script() -> None:
    args = tyro.cli(Args).sized()
    place = Place("acceptance", args.quick)
    engine, environment = load_engine(args.engine)
    entries = [entry for suite in SUITES for entry in measure(args, suite, engine, environment, place.work)]
    write_json(place.result, {"settings": asdict(args), "environment": environment, "entries": entries})
    for entry in entries:
        suite = f"{entry['suite']} (held out)" if entry["held_out"] else entry["suite"]
        CONSOLE.print(f"{suite}: {entry['arm']}, MAT {statistics.Interval(**entry['mat']).text()}", highlight=False)


if __name__ == "__main__":
    main(script)
