"""``echo-rl demo``: the first thing to run. Fetches the model and the prompts at first use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig

ARMS = ("none", "eagle3", "echo")


@dataclass(frozen=True)
class Demo:
    """Plain decoding, EAGLE-3 and ECHO on the same real prompts; exits with 1 if float32 outputs differ."""

    out: Path = Path("results/demo")
    """The folder of the result and the plots; those of an earlier demo are replaced."""
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from echo_rl.experiments.bench import bench_model
        from echo_rl.experiments.plan import BenchConfig, Load
        from echo_rl.experiments.report import tables
        from echo_rl.runtime.models.default_model import fetch_smollm2
        from echo_rl.utils import terminal
        from echo_rl.workloads.datasets import PromptOptions

        console = terminal.console()
        if self.engine.model == "smollm2":
            fetch_smollm2(progress=lambda message: console.print(f"weights: {message}"))
        for name in ("config.json", "blocks.jsonl"):
            (self.out / name).unlink(missing_ok=True)
        alone = Load(concurrency=1, requests=2, max_new_tokens=64, blocks=4)
        crowd = Load(concurrency=16, requests=16, max_new_tokens=48, blocks=2)
        chosen = PromptOptions().load()
        result = bench_model(self.engine, BenchConfig(ARMS, (alone, crowd)), chosen, self.out, console)
        equal, sentence = tables.equality(result)
        console.print(sentence)
        if equal or result["environment"]["dtype"] != "float32":
            return 0
        return 1
