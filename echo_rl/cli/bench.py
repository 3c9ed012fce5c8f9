"""``echo-rl bench``: controllers against concurrency."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from echo_rl.cli.options import EngineOptions, PromptFlags
from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets import PromptOptions

if TYPE_CHECKING:
    from echo_rl.experiments.plan import BenchConfig


@dataclass(frozen=True)
class Bench:
    """Compare controllers on real prompts over a sweep of concurrencies; rerun it to go on where it stopped."""

    arms: tuple[str, ...] = ("none", "chain", "static", "eagle3", "echo")
    """Controllers, the first being the baseline; options as ``echo:name=value,name=value``."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Requests in flight, one load each."""
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    blocks: int = 4
    """Blocks a load; intervals come from resampling them."""
    max_new_tokens: int = 128
    """The most tokens of an answer whose length its prompt's file doesn't give."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """The seed of the prompts' order and of sampling."""
    ignore_eos: bool = False
    """Serve every request to its full length."""
    slo_ttft: float | None = None
    """Seconds to the first token that count as good; with ``--slo-tpot``, goodput is reported."""
    slo_tpot: float | None = None
    """Seconds per output token that count as good."""
    out: Path = Path("results/bench")
    """The folder of the blocks, the result and the plots."""
    data: PromptFlags = field(default_factory=PromptOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from echo_rl.experiments.bench import bench_model
        from echo_rl.utils import terminal

        config, chosen = self.config(), self.data.load(self.seed)
        bench_model(self.engine, replace(config, suite=chosen.suite), chosen, self.out, terminal.console())
        return 0

    def config(self) -> BenchConfig:
        """Raises `ConfigError`."""
        from echo_rl.experiments.plan import BenchConfig, Load
        from echo_rl.workloads.metrics import SLO

        if (self.slo_ttft is None) != (self.slo_tpot is None):
            raise ConfigError("goodput needs both --slo-ttft and --slo-tpot")
        slo = None
        if self.slo_ttft is not None and self.slo_tpot is not None:
            slo = SLO(self.slo_ttft, self.slo_tpot)
        loads = [Load(c, max(self.requests, 2 * c), self.max_new_tokens, self.blocks) for c in self.concurrency]
        return BenchConfig(
            arms=self.arms,
            loads=tuple(loads),
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            slo=slo,
        )
