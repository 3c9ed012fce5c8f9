"""Shows what a calibration found as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.profile import CostProfile


def gate_table(gates: GateCalibration) -> Table:
    """One row a depth; the chosen (sparse) depths are marked."""
    table = Table(title="gates: best-path confidence, accepted against rejected (* chosen)")
    for column in ("depth", "paths", "AUC", "tau", "false truncation", "false extension"):
        table.add_column(column, justify="right")
    for gate in gates.depths:
        rates = (gate.false_truncation, gate.false_extension)
        shares = [f"{100 * r.value:.1f} % [{100 * r.low:.1f}, {100 * r.high:.1f}]" if r else "" for r in rates]
        area = f"{gate.auc.value:.3f} [{gate.auc.low:.3f}, {gate.auc.high:.3f}]" if gate.auc else ""
        mark = "*" if gate.depth in gates.chosen else ""
        table.add_row(f"{gate.depth}{mark}", str(gate.samples), area, f"{gate.tau:.3f}", *shares)
    return table


def knee_table(profile: CostProfile) -> Table:
    """K_max, ECHO's own cost model fitted, and the cost of plain decoding at every measured batch size."""
    threads = "" if profile.modelled else f", {profile.threads} threads"
    table = Table(title=f"cost of a pass on {profile.device} {profile.dtype}{threads}")
    for column in ("batch", "plain pass", "K_max", "free nodes", "gamma", "pass with K_max"):
        table.add_column(column, justify="right")
    for batch in profile.batches:
        knee, hinge = profile.knee(batch), profile.hinge(batch)
        plain, full = profile.ar_seconds(batch), profile.verify_seconds(batch, batch + knee)
        times = (f"{1e3 * plain:.1f} ms", str(knee), str(hinge.k_max), f"{hinge.gamma:.4f}", f"{1e3 * full:.1f} ms")
        table.add_row(str(batch), *times)
    return table
