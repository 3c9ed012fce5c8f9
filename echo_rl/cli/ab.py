"""``echo-rl ab``: two controllers against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echo_rl.cli.options import RECORDED, EngineOptions, FileFlags
from echo_rl.config import EngineConfig
from echo_rl.workloads.datasets import FileOptions

if TYPE_CHECKING:
    from rich.console import Console

    from echo_rl.experiments.plan import AbConfig
    from echo_rl.experiments.targets.backend import Target


@dataclass(frozen=True)
class Ab:
    """Compare two controllers on the same requests in interleaved blocks; rerun it to go on where it stopped.

    Writes ``ab.json`` and ``ab.html``, one file that needs nothing else.
    """

    a: str = "eagle3"
    """The controller to compare with; options as ``echo:name=value,name=value``."""
    b: str = "echo"
    """The controller that is judged."""
    on: tuple[Literal["replay", "live"], ...] = ("replay",)
    """Simulated time over recorded responses, the live engine, or both."""
    workloads: tuple[str, ...] = ("closed:1", "closed:4", "closed:16", "poisson:2", "bursty:0.5,6,5,5")
    """How requests arrive: closed:N, poisson:RATE, bursty:LOW,HIGH,ON,OFF, ramp:LOW,HIGH,SECONDS, shift:SECONDS,N or
    trace:FILE,SPEED."""
    arrivals: tuple[Path, ...] = ()
    """Traces of arrivals to serve instead: times, prompt and answer lengths, in Mooncake's or Azure's form or as plain
    CSV or JSON lines. ``--workloads trace:FILE,2`` is such a trace at twice its speed."""
    blocks: int = 6
    """Blocks a workload; intervals come from resampling them."""
    seconds: float | None = 20.0
    """Seconds a block and arm, of the replay's clock or the wall's."""
    steps: int | None = None
    """The most serving steps of a block and arm."""
    slo_ttft: float = 2.0
    """Seconds to the first token that count as good."""
    slo_tpot: float = 0.1
    """Seconds per output token that count as good."""
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``, whose requests both targets serve; the packaged one by default.
    With ``--prompts`` responses to those are recorded first, in the folder ``recorded`` of ``--out``."""
    held_out: float = 0.3
    """Share of the trace's prompts that is served, the part that `train` and `tune` leave out; 0 serves all."""
    tuned: Path | None = None
    """A ``tuned.json`` of ``echo-rl tune``: arms without options take theirs from it."""
    seed: int = 0
    """The seed of the arrivals, the requests' order and the noise of the replay."""
    out: Path = Path("results/ab")
    """The folder of the runs, the result and the report."""
    files: FileFlags = field(default_factory=FileOptions)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from echo_rl.controllers import registry
        from echo_rl.experiments.ab import run_ab
        from echo_rl.experiments.report import tables
        from echo_rl.utils import terminal

        console, config = terminal.console(), self.config()
        result = run_ab(self.targets(console), config, registry.make, self.out, console)
        for target in result["venues"]:
            console.print(tables.ab(target, result["a"], result["b"], console.width))
        console.print(f"Written: {self.out / 'ab.json'}, {self.out / 'ab.html'}", soft_wrap=True)
        return 0

    def config(self) -> AbConfig:
        """Raises `ConfigError`."""
        from echo_rl.experiments.plan import AbConfig
        from echo_rl.experiments.tune import load_tuned
        from echo_rl.workloads.metrics import SLO

        tuned = load_tuned(self.tuned) if self.tuned else {}
        return AbConfig(
            arms=tuple(tuned.get(arm, arm) for arm in (self.a, self.b)),
            workloads=tuple(f"trace:{path}" for path in self.arrivals) or self.workloads,
            blocks=self.blocks,
            seconds=self.seconds,
            steps=self.steps,
            seed=self.seed,
            slo=SLO(self.slo_ttft, self.slo_tpot),
        )

    def targets(self, console: Console) -> list[Target]:
        """Both serve the same requests. Raises `TraceError` and what the engine raises on loading."""
        from echo_rl.experiments.targets.live import live_target
        from echo_rl.experiments.targets.replay import replay_target
        from echo_rl.replay.live import trace_of

        trace = trace_of(self.engine, self.trace, self.files, self.out / RECORDED, console).split(self.held_out)[1]
        names = dict.fromkeys(self.on)
        return [
            replay_target(trace) if name == "replay" else live_target(self.engine, trace, console) for name in names
        ]
