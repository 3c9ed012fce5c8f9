"""``echo-rl eval``: controllers ranked on replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from echo_rl.experiments.evaluate import EvalConfig
    from echo_rl.replay.trace import Trace


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
    """A ``trace.safetensors`` of ``echo-rl record``; the small one of the package by default."""
    held_out: float = 0.3
    """Share of the prompts that is served; the rest is for `tune` and `train`. 0 serves all."""
    profile: Path | None = None
    """A cost profile of ``echo-rl calibrate`` (cost or roofline); this machine's own or the packaged one by default."""
    seed: int = 0
    """Of the requests' order and of the noise of step times."""
    tuned: Path | None = None
    """A ``tuned.json`` of ``echo-rl tune``: controllers named without options take theirs from it."""
    hindsight: bool = False
    """Also search the best fixed plan of each load."""
    full: bool = False
    """Print tokens/s, speed-ups with intervals and MAT of every load, too."""
    out: Path = Path("results/eval")
    """Where the cells, ``result.json`` and ``speedup.png`` go."""

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.controllers import registry
        from echo_rl.costs.batched_profile import BatchedCostProfile
        from echo_rl.costs.profile import CostProfile
        from echo_rl.experiments.evaluate import evaluate

        console = Console()
        config = self.config()
        trace = load_trace(self.trace)
        served = trace.split(self.held_out)[1]
        profile = CostProfile.of(self.profile)
        result = evaluate(config, served, BatchedCostProfile(profile), registry.planning_by(profile), self.out, console)
        console.print(ranking(result))
        if self.full:
            console.print(loads(result))
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


def load_trace(path: Path | None) -> Trace:
    """The trace at `path`, else the packaged one. Raises `TraceError`."""
    from echo_rl.replay.trace import Trace

    return Trace.load(path) if path else Trace.packaged()


def ranking(result: Mapping[str, Any]) -> Table:
    """One row an arm, best first: geometric means over loads, the speed-up of each load, winners in bold, and how
    long deciding takes at the smallest load, where it takes the largest part of a step."""
    from rich.markup import escape
    from rich.table import Table

    from echo_rl.utils.statistics import Interval

    best = {winner["concurrency"]: {winner["arm"], *winner["tied"]} for winner in result["winners"]}
    cells = {(cell["arm"], cell["concurrency"]): cell for cell in result["cells"]}
    title = (
        f"Speed-up over {result['baseline']}: geometric mean over loads, and by requests in flight\n"
        f"Costs: {result['machine']['title']}"
    )
    view = Table(title=title, title_justify="left", caption="bold: fastest at that load, or not told from it")
    view.add_column("", justify="right")
    view.add_column("controller", overflow="fold")
    for name in ("all loads", f"over {result['reference']}", *(f"{load}" for load in best), "deciding"):
        view.add_column(name, justify="right")
    for row in result["ranking"]:
        overall = [Interval(**row[key]).text() for key in ("speedup", "over_reference")]
        bold = {load: "bold" if row["arm"] in arms else "" for load, arms in best.items()}
        own = {load: cells[row["arm"], load] for load in best}
        numbers = [f"[{bold[load] or 'none'}]{cell['speedup']['estimate']:.2f}" for load, cell in own.items()]
        last = f"{own[min(own)]['deciding']:.1%}"
        view.add_row(str(row["rank"] or "-"), escape(row["arm"]), *(escape(text) for text in overall), *numbers, last)
    return view


def loads(result: Mapping[str, Any]) -> Table:
    """One row per load and arm, fastest first, loads in sections."""
    from rich.markup import escape
    from rich.table import Table

    from echo_rl.utils.statistics import Interval

    title = f"By load, 95 % intervals over blocks\nCosts: {result['machine']['title']}"
    view = Table(title=title, title_justify="left")
    view.add_column("in flight", justify="right")
    view.add_column("controller", overflow="fold")
    for name in ("tokens/s", f"over {result['baseline']}", f"over {result['reference']}", "MAT"):
        view.add_column(name, justify="right")
    order = sorted(result["cells"], key=lambda cell: (cell["concurrency"], -cell["throughput"]["estimate"]))
    for cell, following in zip(order, [*order[1:], None], strict=True):
        mat = "-" if cell["mat"] is None else f"{cell['mat']:.2f}"
        values = [Interval(**cell[key]) for key in ("throughput", "speedup", "over_reference")]
        texts = [escape(value.text(digits)) for value, digits in zip(values, (1, 2, 2), strict=True)]
        last = following is None or following["concurrency"] != cell["concurrency"]
        view.add_row(str(cell["concurrency"]), escape(cell["arm"]), *texts, mat, end_section=last)
    return view


AnyCommand = Eval
