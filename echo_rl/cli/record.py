"""``echo-rl record``: responses with the widest forest at every position, for replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from echo_rl.cli.options import EngineOptions, PromptFlags
from echo_rl.config import EngineConfig
from echo_rl.replay.recorder import RecordOptions
from echo_rl.workloads.datasets import PromptOptions


@dataclass(frozen=True)
class Record:
    """Record responses to real prompts once, to replay them under any controller; rerun it to go on.

    A recording of suites that are held out is served by ``eval`` and ``ab``, and refused by ``train`` and ``tune``.
    """

    out: Path = Path("results/trace")
    """Folder of ``trace.safetensors`` and of the parts so far."""
    max_new_tokens: int = 96
    """The most tokens of a response whose length its prompt's file doesn't give."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """The seed of the prompts' order and of sampling."""
    half: bool = False
    """Keep log-probabilities in 16 bits: half the file, near-ties may replay differently."""
    options: Annotated[RecordOptions, tyro.conf.arg(name="")] = field(default_factory=RecordOptions)
    data: PromptFlags = field(default_factory=PromptOptions)
    engine: EngineOptions = field(default_factory=lambda: EngineConfig(kv_tokens=65_536))

    def run(self) -> int:
        from echo_rl.contracts import SamplingParams
        from echo_rl.replay.live import record_prompts
        from echo_rl.utils import terminal

        console, chosen = terminal.console(), self.data.load(self.seed)
        params = SamplingParams(self.temperature, seed=self.seed, max_new_tokens=self.max_new_tokens)
        trace = record_prompts(self.engine, chosen, params, self.options, self.out, self.half, console)
        positions = sum(response.positions for response in trace.responses)
        console.print(f"{len(trace.responses)} responses, {positions} positions: {self.out / 'trace.safetensors'}")
        return 0
