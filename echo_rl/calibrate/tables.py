"""Shows what a calibration found as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from echo_rl.controllers.echo.gates import DepthGate, GateCalibration, Rate
from echo_rl.costs.profile import CostProfile
from echo_rl.utils.terminal import Row, fitted


def gate_table(gates: GateCalibration, width: int) -> Table:
    """One row a depth; the chosen (sparse) depths are marked."""
    title = "gates: best-path confidence, accepted against rejected (* chosen)"
    rows: list[Row] = [
        ((f"{gate.depth}{'*' if gate.depth in gates.chosen else ''}",), _gate_values(gate)) for gate in gates.depths
    ]
    return fitted(title, ("depth",), rows, width, kept=5)


def _gate_values(gate: DepthGate) -> dict[str, str]:
    return {
        "paths": str(gate.samples),
        "AUC": f"{gate.auc.value:.3f} [{gate.auc.low:.3f}, {gate.auc.high:.3f}]" if gate.auc else "",
        "tau": f"{gate.tau:.3f}",
        "false truncation": _percent(gate.false_truncation),
        "false extension": _percent(gate.false_extension),
    }


def _percent(rate: Rate | None) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" if rate else ""


def knee_table(profile: CostProfile, width: int) -> Table:
    """K_max, ECHO's own cost model fitted, and the cost of plain decoding at every measured batch size."""
    threads = "" if profile.modelled else f", {profile.threads} threads"
    title = f"cost of a pass on {profile.device} {profile.dtype}{threads}"
    rows: list[Row] = []
    for batch in profile.batches:
        knee, hinge = profile.knee(batch), profile.hinge(batch)
        plain, full = profile.ar_seconds(batch), profile.verify_seconds(batch, batch + knee)
        values = {
            "plain pass": f"{1e3 * plain:.1f} ms",
            "K_max": str(knee),
            "free nodes": str(hinge.k_max),
            "gamma": f"{hinge.gamma:.4f}",
            "pass with K_max": f"{1e3 * full:.1f} ms",
        }
        rows.append(((str(batch),), values))
    return fitted(title, ("batch",), rows, width, kept=5)
