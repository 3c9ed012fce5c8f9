"""Tables of the engine alone: throughput, acceptance, plain decoding, losslessness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables.markdown import PENDING, Result, machine, number, table
from echo_rl.utils.statistics import Interval


def speedup(result: Result) -> str:
    """Tokens/s of plain decoding, then every controller's speed-up over it; one column a concurrency."""
    loads = sorted({cell["concurrency"] for cell in result["cells"]})
    found = {(cell["arm"], cell["concurrency"]): cell for cell in result["cells"]}
    plain = result["baseline"]
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in found) if arm != plain]
    rows = [
        [f"`{plain}`, tokens/s", *(Interval(**found[plain, load]["throughput"]).text(0) for load in loads)],
        *([f"`{arm}`", *(Interval(**found[arm, load]["speedup"]).text(2, "×") for load in loads)] for arm in arms),
    ]
    return table(["requests in flight", *map(str, loads)], rows) + machine(result["environment"])


def throughput(result: Result) -> str:
    """Tokens/s, MAT and speed-up of every controller at each concurrency."""
    rows = [
        [
            str(cell["concurrency"]),
            f"`{cell['arm']}`",
            Interval(**cell["throughput"]).text(1),
            Interval(**cell["speedup"]).text(2, "×") if cell["speedup"] else "1",
            number(cell["mat"]),
        ]
        for cell in result["cells"]
    ]
    return table(["in flight", "controller", "tokens/s", "speed-up", "MAT"], rows) + machine(result["environment"])


def budget(result: Result) -> str:
    """Share of the node budget used, and time spent deciding, by concurrency."""
    rows = []
    for cell in result["cells"]:
        if cell["arm"] == "echo":
            phases = cell["phase_seconds"]
            deciding = (phases["plan"] + phases["select"]) / sum(phases.values())
            used = cell["budget_utilisation"]
            rows.append([str(cell["concurrency"]), "-" if used is None else f"{used:.0%}", f"{deciding:.1%}"])
    return table(["in flight", "budget used", "time deciding"], rows)


def acceptance(result: Result) -> str:
    """MAT and acceptance by depth on each suite that things are tuned on."""
    return _acceptance([entry for entry in result["entries"] if not entry.get("held_out")])


def acceptance_held_out(result: Result) -> str:
    """The same on the suites that are held out, which earlier results do not have."""
    return _acceptance([entry for entry in result["entries"] if entry.get("held_out")])


def _acceptance(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [entry["suite"], f"`{entry['arm']}`", Interval(**entry["mat"]).text(), _depths(entry["acceptance_by_depth"])]
        for entry in entries
    ]
    return table(["suite", "shape", "MAT", "acceptance at depth 1, 2, ..."], rows) if rows else PENDING


def plain_decoding(result: Result) -> str:
    """Plain decoding here against other engines."""
    rows = [
        [
            str(entry["batch"]),
            entry["arm"],
            Interval(**entry["tokens_per_second"]).text(1),
            "1" if entry["arm"] == "echo-rl" else Interval(**entry["ours_over_it"]).text(2, "×"),
        ]
        for entry in result["entries"]
    ]
    return table(["batch", "engine", "tokens/s", "ours over it"], rows) + machine(result["environment"])


def neighbours(result: Result) -> str:
    """Decoding beside busy processes, with all threads and with one."""
    rows = [
        [
            str(entry["concurrency"]),
            entry["state"],
            entry["threads"],
            Interval(**entry["tokens_per_second"]).text(1),
            "1" if entry["threads"] == "1 thread" else Interval(**entry["over_one_thread"]).text(2, "×"),
            "1" if entry["state"] == "alone" else Interval(**entry["over_alone"]).text(2, "×"),
            f"{entry['contended']:.0%}",
        ]
        for entry in result["entries"]
    ]
    heads = ["in flight", "neighbours", "threads", "tokens/s", "over one thread", "over alone", "contended steps"]
    return table(heads, rows) + machine(result["environment"])


def losslessness(result: Result) -> str:
    """Requests whose tokens differ from plain decoding's, by dtype."""
    rows = [
        [
            dtype,
            str(found["tokens"]),
            f"{found['diverged_requests']} of {found['requests']}",
            _gap(found["logit_gap_at_divergence"]),
            _gap(found["logit_gap_everywhere"]),
        ]
        for dtype, found in result["dtypes"].items()
    ]
    heads = ["dtype", "tokens compared", "requests that diverge", "median logit gap there", "median gap everywhere"]
    return table(heads, rows)


def _depths(rates: Sequence[float | None]) -> str:
    return ", ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)


def _gap(quantiles: Mapping[str, float] | None) -> str:
    return "-" if quantiles is None else f"{quantiles['median']:.3f}"
