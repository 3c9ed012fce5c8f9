"""``echo-rl demo``: the first thing to run. Fetches the model and the prompts at first use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig


@dataclass(frozen=True)
class Demo:
    """Plain decoding, EAGLE-3 and ECHO on the same real prompts; exits with 1 if float32 outputs differ."""

    seconds: float = 150.0
    """Seconds that measuring may take; the work is fitted to the machine."""
    out: Path = Path("results/demo")
    """The folder of the result and the plots; those of an earlier demo are replaced."""
    engine: EngineOptions = field(default_factory=lambda: EngineConfig(prefill_chunk=4_096))  # one step reads a block

    def run(self) -> int:
        from echo_rl.experiments.demo import demo_model
        from echo_rl.experiments.report import tables
        from echo_rl.runtime.models.default_model import fetch_smollm2
        from echo_rl.utils import terminal
        from echo_rl.workloads.datasets import PromptOptions

        console = terminal.console()
        if self.engine.model == "smollm2":
            fetch_smollm2(progress=lambda message: console.print(f"weights: {message}"))
        result = demo_model(self.engine, PromptOptions().load(), self.seconds, self.out, console)
        equal, sentence = tables.equality(result)
        console.print(sentence)
        if equal or result["environment"]["dtype"] != "float32":
            return 0
        return 1
