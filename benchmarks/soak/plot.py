"""The picture of a soak: memory of both processes, and how the requests ended, over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from echo_rl.utils.plotting import COLOURS, STYLE

OUTCOMES = {
    "finished": COLOURS[3],
    "refused": COLOURS[1],
    "busy": COLOURS[6],
    "left": COLOURS[5],
    "failed": COLOURS[2],
}
"""How a request ends, and the colour for it; administration is left out."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        _memory(upper, result["samples"])
        _requests(lower, result)
        for event in result["events"]:
            for axes in (upper, lower):
                axes.axvspan(event["at"], event["at"] + event["seconds"], color="#000000", alpha=0.12, linewidth=1)
            where = (event["at"] + event["seconds"] / 2, 1.0)
            upper.annotate(event["what"], where, xycoords=("data", "axes fraction"), ha="center", va="bottom", size=8)
        figure.savefig(path, bbox_inches="tight")


def _memory(axes: Axes, samples: list[dict[str, Any]]) -> None:
    at = [sample["at"] for sample in samples]
    for index, (key, name) in enumerate((("front_mb", "front"), ("engine_mb", "engine"))):
        values = [np.nan if sample[key] is None else sample[key] for sample in samples]
        axes.plot(at, values, color=COLOURS[index + 1], label=name)
    axes.set(ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()


def _requests(axes: Axes, result: Mapping[str, Any]) -> None:
    ends = {name: np.array(counts) for name, counts in result["ends"].items() if name in OUTCOMES}
    stretches = len(next(iter(ends.values())))
    length = result["seconds"] / stretches
    speeds = [ends.get(name, np.zeros(stretches)) / length for name in OUTCOMES]
    middles = length * (np.arange(stretches) + 0.5)
    axes.stackplot(middles, speeds, colors=list(OUTCOMES.values()), labels=list(OUTCOMES))
    most = float(sum(speeds).max())
    axes.set(xlabel="seconds", ylabel="requests ended a second", xlim=(0, result["seconds"]), ylim=(0, 1.25 * most))
    axes.legend(ncols=len(OUTCOMES), loc="upper left")
