"""Draws an A/B comparison: ratios with their intervals, and what the two controllers decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from echo_rl.utils.plotting import COLOURS, MARKERS, STYLE, error_bars

SIDES = (("a", COLOURS[1], MARKERS[0]), ("b", COLOURS[2], MARKERS[1]))
KNOBS = (("nodes", "nodes a request"), ("depth", "depth"), ("width", "width"), ("plain", "share of plain steps"))
NAMES = {
    "tokens_per_second": "tokens / second",
    "tokens_per_busy_second": "tokens / busy second",
    "tokens_per_request_second": "tokens / request-second",
}
Cells = Sequence[Mapping[str, Any]]


@rc_context(STYLE)
def ratios(cells: Cells, a: str, b: str) -> Figure:
    """B over A for each workload and rate, with 95 % intervals."""
    figure = Figure(figsize=(7.5, 1.4 + 0.55 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for i, (kind, name) in enumerate(NAMES.items()):
        found = [cell["ratios"][kind] for cell in cells]
        places = [row + 0.22 * (i - 1) for row in range(len(cells))]
        look: Any = {"fmt": MARKERS[i], "color": COLOURS[i + 1], "capsize": 3, "markersize": 5, "label": name}
        axes.errorbar([r["estimate"] for r in found], places, xerr=error_bars(found), **look)
    axes.axvline(1.0, color=COLOURS[0], linewidth=1, linestyle="--")
    axes.set_yticks(range(len(cells)), [cell["workload"] for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel("ratio of B to A (95 % intervals over blocks)")
    axes.set_title(f"B = {b}\nA = {a}", fontsize="medium", loc="left", parse_math=False)
    figure.legend(loc="outside lower center", ncols=len(NAMES))
    return figure


@rc_context(STYLE)
def decisions(rows: Cells, a: str, b: str) -> Figure:
    """Mean knobs against the batch size, one panel a knob."""
    figure, panels = _panels(len(KNOBS), (13, 3.4))
    for axes, (knob, label) in zip(panels, KNOBS, strict=True):
        for side, colour, marker in SIDES:
            name = f"{side.upper()} = {a if side == 'a' else b}"
            axes.plot(range(len(rows)), _values(rows, side, knob), color=colour, marker=marker, label=name)
        axes.set_xticks(range(len(rows)), [row["batch"].replace(" and more", "+") for row in rows])
        axes.set(xlabel="requests in the batch", ylabel=label, ylim=(0, 1.05 if knob == "plain" else None))
    _legend(figure, panels[0])
    return figure


@rc_context(STYLE)
def over_time(rows: Cells, workload: str) -> Figure:
    """Batch size and mean knobs over a block's time."""
    knobs = (("batch", "requests in the batch"), *KNOBS)
    figure, panels = _panels(len(knobs), (15, 3.0))
    for axes, (knob, label) in zip(panels, knobs, strict=True):
        for side, colour, marker in SIDES:
            look: Any = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.4}
            axes.plot([row["time"] for row in rows], _values(rows, side, knob), label=side.upper(), **look)
        axes.set(xlabel="seconds", ylabel=label, ylim=(0, 1.05 if knob == "plain" else None))
    figure.suptitle(workload, parse_math=False)
    _legend(figure, panels[0])
    return figure


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _values(rows: Cells, side: str, knob: str) -> list[float]:
    """NaN, a gap in the line, where this side decided nothing of the kind."""
    found = (row[side][knob] if row[side] else None for row in rows)
    return [float("nan") if value is None else value for value in found]
