"""Sets the style of every plot. Colours are Okabe and Ito's, distinct under every kind of colour vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B2A800")
MARKERS = "osD^vPX*"
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def error_bars(intervals: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[below, above]: how far intervals reach from their estimates; nothing where one block gave no interval."""
    return [
        [0.0 if each[end] is None else abs(each["estimate"] - each[end]) for each in intervals]
        for end in ("low", "high")
    ]


def concurrency_axis(axes: Axes, values: Sequence[int]) -> None:
    """A base-2 axis with a tick at each measured concurrency."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(tick) for tick in ticks])
    axes.set_xlabel("requests in flight")
