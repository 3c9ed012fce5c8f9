"""Draws a benchmark's result as PNG files. Colours are Okabe and Ito's, told apart by every kind of colour vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from echo_rl.utils.plotting import COLOURS, MARKERS, STYLE, concurrency_axis, error_bars

PHASE_COLOURS = {
    "verify": "#0072B2",
    "draft": "#E69F00",
    "plan": "#D55E00",
    "select": "#CC79A7",
    "accept": "#009E73",
    "commit": "#56B4E9",
    "schedule": "#999999",
    "other": "#DDDDDD",
}
Result = Mapping[str, Any]


def draw(result: Result, out: Path) -> list[Path]:
    """Writes ``throughput.png``, ``acceptance.png`` and ``phases.png`` into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context(STYLE):
        for name, make in (("throughput", throughput), ("acceptance", acceptance), ("phases", phases)):
            figure = make(result)
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight")
    return paths


def throughput(result: Result) -> Figure:
    """Tokens per second, and the speed-up over the baseline, against concurrency."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    left, right = figure.subplots(1, 2)
    for index, arm in enumerate(_arms(result)):
        cells = _cells(result, arm)
        _line(left, cells, "throughput", arm, index)
        if arm != result["baseline"]:
            _line(right, cells, "speedup", arm, index)
    right.axhline(1.0, color=COLOURS[0], linewidth=1, linestyle="--", label=result["baseline"])
    for axes, label in ((left, "output tokens / s"), (right, f"speed-up over {result['baseline']}")):
        concurrency_axis(axes, [cell["concurrency"] for cell in result["cells"]])
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    left.legend()
    figure.suptitle("Throughput against concurrency (bars: 95 % intervals over blocks)")
    return figure


def acceptance(result: Result) -> Figure:
    """Probability of accepting a node at each depth given its path, at the lowest concurrency."""
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    axes = figure.subplots()
    lowest = min(cell["concurrency"] for cell in result["cells"])
    for index, arm in enumerate(_arms(result)):
        cell = next(cell for cell in _cells(result, arm) if cell["concurrency"] == lowest)
        points = [(depth + 1, p) for depth, p in enumerate(cell["acceptance_by_depth"]) if p is not None]
        if points:
            depths, rates = zip(*points, strict=True)
            axes.plot(depths, rates, label=f"{arm} (MAT {cell['mat']:.2f})", **_look(index))
    axes.set(xlabel="depth in the tree", ylabel="acceptance given the path", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Acceptance by depth at concurrency {lowest}")
    if axes.lines:
        axes.legend()
    return figure


def phases(result: Result) -> Figure:
    """Mean time of a step by phase, one stacked bar per arm, one panel per concurrency."""
    loads = sorted({cell["concurrency"] for cell in result["cells"]})
    columns = min(3, len(loads))
    rows = -(-len(loads) // columns)
    height = 0.6 + 0.28 * len(_arms(result))
    figure = Figure(figsize=(2.2 + 3.2 * columns, 0.6 + rows * (height + 0.5)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, load in zip(panels, loads, strict=False):
        _stack(axes, [cell for cell in result["cells"] if cell["concurrency"] == load])
        axes.set_title(f"concurrency {load}", fontsize="medium")
        axes.set_xlabel("milliseconds a step")
    for axes in panels[len(loads) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()  # the baseline on top
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PHASE_COLOURS))
    return figure


def _line(axes: Axes, cells: Sequence[Mapping[str, Any]], key: str, arm: str, index: int) -> None:
    xs = [cell["concurrency"] for cell in cells]
    ys = [cell[key]["estimate"] for cell in cells]
    axes.errorbar(xs, ys, yerr=error_bars([cell[key] for cell in cells]), label=arm, capsize=3, **_look(index))


def _stack(axes: Axes, cells: Sequence[Mapping[str, Any]]) -> None:
    left = [0.0] * len(cells)
    labels = [cell["arm"] for cell in cells]
    for phase, colour in PHASE_COLOURS.items():
        widths = [1000 * cell["phase_seconds"][phase] / max(1, cell["steps"]) for cell in cells]
        axes.barh(labels, widths, left=left, color=colour, label=phase, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.grid(visible=False, axis="y")


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.8,
    }


def _arms(result: Result) -> list[str]:
    return list(dict.fromkeys(cell["arm"] for cell in result["cells"]))


def _cells(result: Result, arm: str) -> list[Mapping[str, Any]]:
    return sorted((cell for cell in result["cells"] if cell["arm"] == arm), key=lambda cell: cell["concurrency"])
