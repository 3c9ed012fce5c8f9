"""A comparison as one HTML file that needs nothing else: plots are data URIs, no script, no outside address.

Every text that comes from outside passes `escape`; the page's own policy forbids loading anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from echo_rl.experiments.report import plots_ab
from echo_rl.utils.statistics import Interval

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
"""
LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"))
DECIDED = (("nodes", "nodes"), ("depth", "depth"), ("width", "width"), ("plain steps", "plain"))


def ab_page(result: Mapping[str, Any]) -> str:
    """The whole report of an A/B comparison."""
    a, b, config = result["a"], result["b"], result["config"]
    ends = [f"{config[name]:g} {name}" for name in ("seconds", "steps") if config[name] is not None]
    body = [
        paragraph(f"A = {a}"),
        paragraph(f"B = {b}"),
        paragraph(
            f"{config['blocks']} blocks a workload, each up to {' or '.join(ends)}, seed {config['seed']}. Both arms "
            "of a block met the same requests and arrivals, one arm after the other in the order A B B A. "
            "Intervals are 95 %, from resampling pairs of blocks."
        ),
        *(part for target in result["venues"] for part in _target(target, config, a, b)),
    ]
    return page("A/B comparison", body)


def page(title: str, body: Iterable[str]) -> str:
    """A complete document; `body` is HTML, `title` text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table of texts."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>\n{lines}</tbody></table>"
    )


def image(figure: Figure, alt: str) -> str:
    """The figure as a PNG inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<p><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></p>'


def verdict(ratio: Interval) -> str:
    """Who is faster, as far as the interval tells."""
    if ratio.low is None:
        return "one block: no interval"
    return {1: "B is faster", -1: "A is faster", 0: "no clear difference"}[ratio.side()]


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A dash for what does not exist."""
    return "-" if value is None else form.format(value)


def _target(target: Mapping[str, Any], config: Mapping[str, Any], a: str, b: str) -> list[str]:
    cells, name = target["cells"], target["venue"]
    return [
        f"<h2>{escape(name)}</h2>",
        _verdicts(cells, target["overall"]),
        image(plots_ab.ratios(cells, a, b), "Ratios of B to A by workload"),
        _speeds(cells),
        _latencies(cells, config["slo"]),
        _outputs(cells),
        "<h3>What the two decided</h3>",
        _by_batch(target["by_batch"]),
        image(plots_ab.decisions(target["by_batch"], a, b), "Mean decisions by batch size"),
        *(
            image(plots_ab.over_time(c["over_time"], c["workload"]), f"Decisions over time, {c['workload']}")
            for c in cells
        ),
        table("Environment", ("what", "value"), [(key, str(value)) for key, value in target["environment"].items()]),
    ]


def _verdicts(cells: Sequence[Mapping[str, Any]], overall: Mapping[str, Any]) -> str:
    mean = Interval(**overall)
    rows = [("all (geometric mean)", mean.text(3, "x"), verdict(mean), "")]
    for cell in cells:
        ratio = Interval(**cell["ratios"][cell["headline"]])
        rows.append((cell["workload"], ratio.text(3, "x"), verdict(ratio), plots_ab.NAMES[cell["headline"]]))
    caption = (
        "B over A, by the rate that suits the workload: the clock's in closed loops, what users see under arrivals"
    )
    return table(caption, ("workload", "B / A", "verdict", "rate"), rows)


def _speeds(cells: Sequence[Mapping[str, Any]]) -> str:
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
    return table(caption, head, rows)


def _latencies(cells: Sequence[Mapping[str, Any]], slo: Mapping[str, float] | None) -> str:
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
    return table(caption, ("workload", "arm", *head, "good requests / s"), rows)


def _outputs(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        found = cell["outputs"]
        first = next(iter(found["first_difference"].items()), None)
        where = f"{first[0]}, token {first[1]}" if first else ""
        rows.append((cell["workload"], str(found["requests"]), str(found["tokens"]), str(found["differing"]), where))
    head = ("workload", "requests", "tokens", "differing requests", "first difference")
    return table("Outputs of requests that both arms served, token by token", head, rows)


def _by_batch(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["batch", *(f"{name} {letter}" for name in ("steps", *(n for n, _ in DECIDED)) for letter in "AB")]
    lines = []
    for row in rows:
        sides = (row["a"], row["b"])
        counts = [str(side["steps"]) if side else "0" for side in sides]
        means = [number(side[key] if side else None) for _, key in DECIDED for side in sides]
        lines.append((row["batch"], *counts, *means))
    caption = "Means over steps: nodes a request, depth and width while speculating, share of plain steps"
    return table(caption, head, lines)
