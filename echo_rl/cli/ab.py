"""``echo-rl ab``: two controllers against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from echo_rl.experiments.plan import TrialConfig
    from echo_rl.experiments.trials import Venue


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
    """What arrives: closed:N, poisson:RATE, bursty:LOW,HIGH,ON,OFF, ramp:LOW,HIGH,SECONDS or shift:SECONDS,N."""
    blocks: int = 6
    """Blocks a workload; intervals come from resampling them."""
    seconds: float | None = 20.0
    """Seconds a block and arm, of the replay's clock or the wall's."""
    steps: int | None = None
    """Most serving steps a block and arm."""
    slo_ttft: float = 2.0
    """Seconds to the first token that count as good."""
    slo_tpot: float = 0.1
    """Seconds per output token that count as good."""
    trace: Path | None = None
    """A ``trace.safetensors`` of ``echo-rl record``, whose requests both venues serve; the packaged one by default."""
    held_out: float = 0.3
    """Share of the trace's prompts that is served, the part that `train` and `tune` leave out; 0 serves all."""
    tuned: Path | None = None
    """A ``tuned.json`` of ``echo-rl tune``: arms without options take theirs from it."""
    seed: int = 0
    """Of the arrivals, the requests' order and the noise of the replay."""
    out: Path = Path("results/ab")
    """Where the runs, the result and the report go."""
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.controllers import registry
        from echo_rl.experiments.ab import run_ab

        console, config = Console(), self.config()
        result = run_ab(self.venues(console), config, registry.make, self.out, console)
        for venue in result["venues"]:
            console.print(table(venue, result["a"], result["b"], console.width))
        console.print(f"Written: {self.out / 'ab.json'}, {self.out / 'ab.html'}", soft_wrap=True)
        return 0

    def config(self) -> TrialConfig:
        """Raises `ConfigError`."""
        from echo_rl.experiments.plan import TrialConfig
        from echo_rl.experiments.tune import load_tuned
        from echo_rl.workloads.metrics import SLO

        tuned = load_tuned(self.tuned) if self.tuned else {}
        return TrialConfig(
            arms=tuple(tuned.get(arm, arm) for arm in (self.a, self.b)),
            workloads=self.workloads,
            blocks=self.blocks,
            seconds=self.seconds,
            steps=self.steps,
            seed=self.seed,
            slo=SLO(self.slo_ttft, self.slo_tpot),
        )

    def venues(self, console: Any) -> list[Venue]:
        """Both serve the same requests. Raises `TraceError` and what the engine raises on loading."""
        from echo_rl.experiments.trials import live_venue, replay_venue
        from echo_rl.replay.trace import Trace

        whole = Trace.load(self.trace) if self.trace else Trace.packaged()
        trace = whole.split(self.held_out)[1]
        found = []
        for name in dict.fromkeys(self.on):
            if name == "replay":
                found.append(replay_venue(trace))
                continue
            from echo_rl.cli.session import load_engine

            with console.status("loading the model"):
                engine, environment = load_engine(self.engine)
            self._recorded_here(trace.provenance, environment, console)
            found.append(live_venue(engine, environment, trace))
        return found

    def _recorded_here(self, provenance: str, environment: Mapping[str, str], console: Any) -> None:
        """Raises `ConfigError` where another model recorded the trace, whose prompts mean nothing to this one."""
        model, told, rest = provenance.partition(", drafter ")
        if not told:  # not by `echo-rl record`
            return
        if Path(model).name != Path(self.engine.model).name:
            raise ConfigError(
                f"the trace was recorded from {model}, the engine serves {self.engine.model}; record one of it "
                f"(echo-rl record --engine.model {self.engine.model}) and give it as --trace"
            )
        if rest.partition(", ")[0] != environment["drafter"]:
            console.print("note: another drafter recorded the trace; a replay of it says nothing about this engine's")


WIDE = 120
"""Terminal columns that the whole table needs."""


def table(venue: Mapping[str, Any], a: str, b: str, width: int = WIDE) -> Table:
    """One row a workload: B over A by the rate that suits it and who is faster; all three rates where there is room."""
    from rich.markup import escape
    from rich.table import Table

    from echo_rl.experiments.report.html import verdict
    from echo_rl.experiments.report.plots_ab import NAMES
    from echo_rl.utils.statistics import Interval

    title = f"On {venue['venue']}: B = {b} over A = {a}, 95 % intervals over blocks"
    view = Table(title=escape(title), title_justify="left")
    more = NAMES if width >= WIDE else {}
    for name in ("workload", "B / A", "verdict", "outputs equal", *more.values()):
        view.add_column(name, justify="right" if view.columns else "left")
    for cell in venue["cells"]:
        ratios = {kind: Interval(**ratio) for kind, ratio in cell["ratios"].items()}
        head, outputs = ratios[cell["headline"]], cell["outputs"]
        same = f"{outputs['requests'] - outputs['differing']}/{outputs['requests']}"
        texts = (escape(ratios[kind].text(2, "x")) for kind in more)
        view.add_row(cell["workload"], escape(head.text(2, "x")), verdict(head), same, *texts)
    overall = Interval(**venue["overall"])
    view.add_row("geometric mean", escape(overall.text(2, "x")), verdict(overall))
    return view
