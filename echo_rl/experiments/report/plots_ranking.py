"""Draws a ranking: the speed-up of every arm against concurrency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from echo_rl.utils import plotting

DASHES = ("-", "--", ":")


def draw(result: Mapping[str, Any], out: Path) -> Path:
    """Writes ``speedup.png``: speed-up over plain decoding against concurrency, a line an arm, best first."""
    with rc_context(plotting.STYLE):
        figure = Figure(figsize=(9.5, 5.0), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(row for row in result["ranking"] if row["arm"] != result["baseline"]):
            cells = [cell for cell in result["cells"] if cell["arm"] == row["arm"]]
            axes.plot(
                [cell["concurrency"] for cell in cells],
                [cell["speedup"]["estimate"] for cell in cells],
                color=plotting.COLOURS[place % 8], marker=plotting.MARKERS[place % 8], linestyle=DASHES[place // 8 % 3],
                markersize=4, linewidth=1.5, label=f"{row['arm']} ({row['speedup']['estimate']:.2f})",
            )  # fmt: skip
        axes.axhline(1.0, color="#777777", linewidth=1)
        plotting.concurrency_axis(axes, [cell["concurrency"] for cell in result["cells"]])
        axes.set_ylabel(f"speed-up over {result['baseline']}")
        axes.set_title(f"replayed with the costs of {result['machine']['title']}")
        figure.legend(loc="outside right upper", fontsize="small", title="geometric mean")
        path = out / "speedup.png"
        figure.savefig(path, bbox_inches="tight")
    return path
