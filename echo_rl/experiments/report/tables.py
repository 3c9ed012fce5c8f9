"""The results of experiments as tables for the terminal, each of at most the `width` that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from echo_rl.experiments.report.html import number, verdict
from echo_rl.experiments.report.plots_ab import NAMES
from echo_rl.utils.statistics import Interval
from echo_rl.utils.terminal import Cell, Row, fitted
from echo_rl.workloads.datasets import SUITES

Result = Mapping[str, Any]
MOST_LINES = 8
"""Differing requests that are named one by one."""


def bench(result: Result, width: int) -> Table:
    """One row per load and arm, loads in sections."""
    title = f"{_served(result)}Against {result['baseline']}, 95 % intervals over blocks"
    rows = [((str(cell["concurrency"]), cell["arm"]), _bench_values(cell)) for cell in result["cells"]]
    return fitted(title, ("in flight", "controller"), rows, width, kept=3, sections=True)


def _bench_values(cell: Result) -> dict[str, str]:
    latency = cell["latency"]
    values = {
        "tokens/s": _interval(cell["throughput"], 1),
        "speed-up": _ratio(cell["speedup"]),
        "MAT": number(cell["mat"]),
        "outputs equal": _equal(cell["outputs"]),
        "budget used": number(cell["budget_utilisation"], "{:.0%}"),
        "TTFT p50": _milliseconds(latency["ttft"], "p50"),
        "TPOT p50": _milliseconds(latency["tpot"], "p50"),
        "TPOT p99": _milliseconds(latency["tpot"], "p99"),
    }
    good = {} if cell["goodput"] is None else {"good requests/s": number(cell["goodput"])}
    return values | good


def equality(result: Result) -> tuple[bool, str]:
    """True where every arm of a benchmark gave the baseline's tokens, with a sentence that tells where it did not."""
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


def ab(target: Result, a: str, b: str, width: int) -> Table:
    """One row a workload: B over A by the rate that suits it, who is faster, and all three rates."""
    title = f"On {target['venue']}: B = {b} over A = {a}, 95 % intervals over blocks"
    rows: list[Row] = []
    for cell in target["cells"]:
        head = cell["ratios"][cell["headline"]]
        values = {"B / A": _ratio(head), "verdict": verdict(Interval(**head)), "outputs equal": _equal(cell["outputs"])}
        every = {name: _ratio(cell["ratios"][kind]) for kind, name in NAMES.items()}
        rows.append(((cell["workload"],), values | every))
    overall = {"B / A": _ratio(target["overall"]), "verdict": verdict(Interval(**target["overall"]))}
    return fitted(title, ("workload",), [*rows, (("geometric mean",), overall)], width, kept=3)


def load(result: Result, width: int) -> Table:
    """One row per workload and arm, workloads in sections."""
    compared = bool(result["overall"])
    against = f"Against {result['baseline']}, " if compared else ""
    title = f"{_served(result)}{against}95 % intervals over blocks"
    rows = [((cell["workload"], cell["arm"]), _load_values(cell, compared)) for cell in result["cells"]]
    return fitted(title, ("workload", "arm"), rows, width, kept=2 + compared, sections=True)


def _load_values(cell: Result, compared: bool) -> dict[str, str]:
    values = {"tokens/s": _interval(cell["rates"]["tokens_per_second"], 1)}
    if compared:
        values["ratio"] = _ratio(cell["ratios"].get(cell["headline"]))
    values["failed"] = str(sum(cell["errors"].values()))
    for name in ("ttft", "tpot", "itl", "e2e"):
        found = cell["latency"][name]
        text = "/".join(f"{1000 * found[key]:.0f}" for key in ("p50", "p95", "p99")) if found else "-"
        values[f"{name.upper()} ms p50/p95/p99"] = text
    values["requests/s"] = number(cell["requests_per_second"])
    return values | ({} if cell["goodput"] is None else {"good/s": number(cell["goodput"])})


def remarks(result: Result) -> list[str]:
    """The lines below the table of a load test: overall ratios, unequal outputs, errors, the client's own cost."""
    cells = result["cells"]
    lines = [
        f"{arm} over {result['baseline']}, all workloads: {_ratio(ratio)}" for arm, ratio in result["overall"].items()
    ]
    for cell in cells:
        where, outputs = f"{cell['arm']}, {cell['workload']}", cell["outputs"]
        if outputs and outputs["differing"]:
            lines.append(f"{where}: {outputs['differing']} of {outputs['requests']} outputs differ")
        if cell["errors"]:
            lines.append(f"{where}: " + ", ".join(f"{count} x {kind}" for kind, count in cell["errors"].items()))
    share = max(cell["client_cpu_share"] for cell in cells)
    each = max(cell["client_cpu_seconds_per_chunk"] for cell in cells)
    return [*lines, f"This client took at most {share:.1%} of a core, {1e6 * each:.0f} us a chunk."]


def ranking(result: Result, width: int) -> Table:
    """One row an arm, best first: geometric means over loads, the speed-up of each load, winners in bold, and how
    long deciding takes at the smallest load, where it takes the largest part of a step."""
    best = {winner["concurrency"]: {winner["arm"], *winner["tied"]} for winner in result["winners"]}
    cells = {(cell["arm"], cell["concurrency"]): cell for cell in result["cells"]}
    title = (
        f"Speed-up over {result['baseline']}: geometric mean over loads, and by requests in flight\n"
        f"Costs: {result['machine']['title']}"
    )
    rows: list[Row] = []
    for row in result["ranking"]:
        own = {load: cells[row["arm"], load] for load in best}
        speedups = {load: f"{cell['speedup']['estimate']:.2f}" for load, cell in own.items()}
        values: dict[str, Cell] = {
            "all loads": _interval(row["speedup"]),
            **{str(n): Text(text, "bold" if row["arm"] in best[n] else "") for n, text in speedups.items()},
            f"over {result['reference']}": _interval(row["over_reference"]),
            "deciding": f"{own[min(own)]['deciding']:.1%}",
        }
        rows.append(((str(row["rank"] or "-"), row["arm"]), values))
    view = fitted(title, ("", "controller"), rows, width, kept=1 + len(best))
    bold = "bold: fastest at that load, or not told from it"
    view.caption = f"{bold}\n{view.caption}" if view.caption else bold
    return view


def by_load(result: Result, width: int) -> Table:
    """One row per load and arm, fastest first, loads in sections."""
    title = f"By load, 95 % intervals over blocks\nCosts: {result['machine']['title']}"
    order = sorted(result["cells"], key=lambda cell: (cell["concurrency"], -cell["throughput"]["estimate"]))
    rows = [((str(cell["concurrency"]), cell["arm"]), _cell_values(cell, result)) for cell in order]
    return fitted(title, ("in flight", "controller"), rows, width, kept=3, sections=True)


def _cell_values(cell: Result, result: Result) -> dict[str, str]:
    return {
        "tokens/s": _interval(cell["throughput"], 1),
        f"over {result['baseline']}": _interval(cell["speedup"]),
        "MAT": number(cell["mat"]),
        f"over {result['reference']}": _interval(cell["over_reference"]),
    }


def tuned(found: Result, width: int) -> Table:
    """One row a controller, best score first."""
    rows: list[Row] = []
    for name, row in sorted(found.items(), key=lambda item: -(item[1]["score"] or 0.0)):
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items()) or "defaults"
        scores = {"tuned": number(row["score"], "{:.3f}"), "defaults": number(row["default_score"], "{:.3f}")}
        rows.append(((name, options), scores | {"tried": str(row["tried"])}))
    title = "Geometric mean over loads of the speed-up over none"
    return fitted(title, ("controller", "best options"), rows, width, kept=3)


def _served(result: Result) -> str:
    """The start of a title that names the prompts, unless they are those of the usual mix."""
    suite = result["config"].get("suite", "all")
    apart = " (held out)" if suite in SUITES and SUITES[suite].held_out else ""
    return "" if suite == "all" else f"Prompts: {suite}{apart}. "


def _interval(interval: Mapping[str, Any], digits: int = 2) -> str:
    return Interval(**interval).text(digits)


def _ratio(interval: Mapping[str, Any] | None) -> str:
    """1 is the baseline over itself."""
    return Interval(**interval).text(2, "x") if interval else "1"


def _milliseconds(latency: Mapping[str, float] | None, key: str) -> str:
    return "-" if latency is None else f"{1000 * latency[key]:.0f} ms"


def _equal(outputs: Mapping[str, int]) -> str:
    return f"{outputs['requests'] - outputs['differing']}/{outputs['requests']}"
