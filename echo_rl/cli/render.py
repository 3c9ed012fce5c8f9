"""A benchmark result as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from echo_rl.utils.statistics import Interval

WIDE = 130
"""Terminal columns that the whole table needs."""

MOST_LINES = 8
"""Differing requests that are named one by one."""


def table(result: Mapping[str, Any], width: int = WIDE) -> Table:
    """One row per load and arm, loads in sections; a narrow terminal gets the main columns only."""
    view = Table(title=f"Against {result['baseline']}, 95 % intervals over blocks", title_justify="left")
    view.add_column("in flight", justify="right")
    view.add_column("controller")
    cells = result["cells"]
    rows = [_values(cell, full=width >= WIDE) for cell in cells]
    for name in rows[0]:
        view.add_column(name, justify="right")
    for cell, values, following in zip(cells, rows, [*cells[1:], None], strict=True):
        last = following is None or following["concurrency"] != cell["concurrency"]
        view.add_row(str(cell["concurrency"]), cell["arm"], *values.values(), end_section=last)
    return view


def _values(cell: Mapping[str, Any], full: bool) -> dict[str, str]:
    speedup, latency, outputs = cell["speedup"], cell["latency"], cell["outputs"]
    values = {
        "tokens/s": Interval(**cell["throughput"]).text(1),
        "speed-up": Interval(**speedup).text(2, "x") if speedup else "1",
        "MAT": _number(cell["mat"], "{:.2f}"),
    }
    if full:
        values |= {
            "budget used": _number(cell["budget_utilisation"], "{:.0%}"),
            "TTFT p50": _milliseconds(latency["ttft"], "p50"),
            "TPOT p50": _milliseconds(latency["tpot"], "p50"),
            "TPOT p99": _milliseconds(latency["tpot"], "p99"),
            "outputs equal": f"{outputs['requests'] - outputs['differing']}/{outputs['requests']}",
        }
        if cell["goodput"] is not None:
            values["good requests/s"] = f"{cell['goodput']:.2f}"
    return values


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(latency: Mapping[str, float] | None, key: str) -> str:
    return "-" if latency is None else f"{1000 * latency[key]:.0f} ms"


def equality(result: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether every arm gave the baseline's tokens, and a sentence that says so or where it did not."""
    others = [cell for cell in result["cells"] if cell["arm"] != result["baseline"]]
    tokens = sum(cell["outputs"]["tokens"] for cell in others)
    lines = [
        f"  {cell['arm']} at concurrency {cell['concurrency']}: {request} from token {index}"
        for cell in others
        for request, index in cell["outputs"]["first_difference"].items()
    ]
    if not lines:
        return True, f"Outputs are equal: {tokens} tokens match those of {result['baseline']}."
    requests = sum(cell["outputs"]["requests"] for cell in others)
    head = f"Outputs differ from those of {result['baseline']} in {len(lines)} of {requests} requests:"
    more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return False, "\n".join([head, *lines[:MOST_LINES], *more])
