"""Draws a calibration: the cost surface with its knees, and how well confidence tells right paths from wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from echo_rl.controllers.echo.gates import GateCalibration, Rate
from echo_rl.costs.profile import CostProfile
from echo_rl.utils.plotting import COLOURS, MARKERS, STYLE


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight")


@rc_context(STYLE)
def cost(profile: CostProfile) -> Figure:
    """Milliseconds of a verify pass against its rows, one line a batch size; a star marks K_max."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, batch in enumerate(profile.batches):
        rows = [r for r in profile.rows if r >= batch]
        style: Any = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(rows, [1e3 * profile.verify_seconds(batch, r) for r in rows], label=f"batch {batch}", **style)
        knee = batch + profile.knee(batch)
        axes.plot([knee], [1e3 * profile.verify_seconds(batch, knee)], "*", color=style["color"], markersize=13)
    axes.set(xscale="log", yscale="log", xlabel="verified rows in the pass", ylabel="milliseconds")
    axes.set_title(f"{profile.model}, {profile.device} {profile.dtype}, {profile.threads} threads (star: K_max)")
    axes.legend(fontsize=8)
    return figure


@rc_context(STYLE)
def judgement(gates: GateCalibration) -> Figure:
    """AUC by depth, and the shares of wrong judgements at the calibrated thresholds, with 95 % intervals."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = [gate.depth for gate in gates.depths]
    _rates(left, depths, [gate.auc for gate in gates.depths], "AUC", 0)
    for depth in gates.chosen:
        left.axvline(depth, color="#999999", linestyle=":", linewidth=1)
    left.axhline(0.5, color="#999999", linewidth=1)
    left.set(xlabel="depth (dotted: chosen)", ylabel="AUC of best-path confidence")
    _rates(right, depths, [gate.false_truncation for gate in gates.depths], "false truncation", 1)
    _rates(right, depths, [gate.false_extension for gate in gates.depths], "false extension", 2)
    right.set(xlabel="depth", ylabel="share of paths", ylim=(0, 1))
    right.legend()
    return figure


def _rates(axes, depths: list[int], rates: list[Rate | None], label: str, index: int) -> None:  # type: ignore[no-untyped-def]
    known = [(depth, rate) for depth, rate in zip(depths, rates, strict=True) if rate is not None]
    values = [rate.value for _, rate in known]
    errors = [[r.value - r.low for _, r in known], [r.high - r.value for _, r in known]]
    style: Any = {"color": COLOURS[index], "marker": MARKERS[index], "capsize": 3}
    axes.errorbar([depth for depth, _ in known], values, yerr=errors, label=label, **style)
