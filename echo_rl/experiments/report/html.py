"""The report of an A/B comparison as one HTML file that needs nothing else: pictures are data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from echo_rl.experiments.report import plots_ab
from echo_rl.utils.statistics import Interval

LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"))
DECIDED = (("nodes", "nodes"), ("depth", "depth"), ("width", "width"), ("plain steps", "plain"))


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def ab_page(result: Mapping[str, Any]) -> str:
    """The whole report of an A/B comparison."""
    config = result["config"]
    ends = [f"{config[name]:g} {name}" for name in ("seconds", "steps") if config[name] is not None]
    pages = Environment(
        loader=PackageLoader("echo_rl", "experiments/report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    pages.filters["png"] = png
    pages.globals.update(
        plots=plots_ab, verdicts=_verdicts, speeds=_speeds, latencies=_latencies, outputs=_outputs, by_batch=_by_batch
    )
    return pages.get_template("ab.html.jinja").render(
        a=result["a"], b=result["b"], config=config, ends=" or ".join(ends), targets=result["venues"]
    )


def png(figure: Figure) -> str:
    """The figure's PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def verdict(ratio: Interval) -> str:
    """The side that is faster, as far as the interval tells."""
    if ratio.low is None:
        return "one block: no interval"
    return {1: "B is faster", -1: "A is faster", 0: "no clear difference"}[ratio.side()]


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A dash for what does not exist."""
    return "-" if value is None else form.format(value)


def _verdicts(cells: Sequence[Mapping[str, Any]], overall: Mapping[str, Any]) -> Table:
    mean = Interval(**overall)
    rows = [("all (geometric mean)", mean.text(3, "x"), verdict(mean), "")]
    for cell in cells:
        ratio = Interval(**cell["ratios"][cell["headline"]])
        rows.append((cell["workload"], ratio.text(3, "x"), verdict(ratio), plots_ab.NAMES[cell["headline"]]))
    caption = (
        "B over A, by the rate that suits the workload: the clock's in closed loops, what users see under arrivals"
    )
    return Table(caption, ("workload", "B / A", "verdict", "rate"), rows)


def _speeds(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            cell["workload"],
            letter,
            *(Interval(**arm["rates"][kind]).text(1) for kind in plots_ab.NAMES),
            number(arm["mat"]),
            number(arm["budget_utilisation"], "{:.0%}"),
            str(arm["requests"]),
            str(arm["cut"]),
            number(arm["fairness"]["jain"], "{:.3f}"),
            number(arm["fairness"]["worst_tenth"], "{:.3f}"),
        )
        for cell in cells
        for letter, arm in zip("AB", cell["arms"], strict=True)
    ]
    head = ("workload", "arm", *plots_ab.NAMES.values(), "MAT", "budget used", "requests", "cut", "Jain", "worst tenth")
    caption = (
        "Speed and fairness. Cut requests were in flight at a block's end: their tokens count, their latencies do not. "
        "Jain's index of the requests' tokens a second is 1 where all are equal; worst tenth: the slowest tenth's mean "
        "over the mean of all."
    )
    return Table(caption, head, rows)


def _latencies(cells: Sequence[Mapping[str, Any]], slo: Mapping[str, float] | None) -> Table:
    rows = []
    for cell in cells:
        for letter, arm in zip("AB", cell["arms"], strict=True):
            found = [arm["latency"][key] for _, key in LATENCIES]
            times = [number(1e3 * f[p] if f else None, "{:.1f}") for f in found for p in ("p50", "p99")]
            rows.append((cell["workload"], letter, *times, number(arm["goodput"], "{:.3f}")))
    head = [f"{name} {p} (ms)" for name, _ in LATENCIES for p in ("p50", "p99")]
    caption = "Latency of finished requests"
    if slo:
        caption += f"; good: first token within {slo['ttft']:g} s and {slo['tpot']:g} s a token after it"
    return Table(caption, ("workload", "arm", *head, "good requests / s"), rows)


def _outputs(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        found = cell["outputs"]
        first = next(iter(found["first_difference"].items()), None)
        where = f"{first[0]}, token {first[1]}" if first else ""
        rows.append((cell["workload"], str(found["requests"]), str(found["tokens"]), str(found["differing"]), where))
    head = ("workload", "requests", "tokens", "differing requests", "first difference")
    return Table("Outputs of requests that both arms served, token by token", head, rows)


def _by_batch(rows: Sequence[Mapping[str, Any]]) -> Table:
    head = ["batch", *(f"{name} {letter}" for name in ("steps", *(n for n, _ in DECIDED)) for letter in "AB")]
    lines = []
    for row in rows:
        sides = (row["a"], row["b"])
        counts = [str(side["steps"]) if side else "0" for side in sides]
        means = [number(side[key] if side else None) for _, key in DECIDED for side in sides]
        lines.append((row["batch"], *counts, *means))
    caption = "Means over steps: nodes a request, depth and width while speculating, share of plain steps"
    return Table(caption, head, lines)
