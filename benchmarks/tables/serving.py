"""Tables of the server: identity, overhead, a sweep of controllers, a soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks.tables.markdown import Result, machine, table
from echo_rl.utils.statistics import Interval


def server(result: Result) -> str:
    """Controllers through HTTP: throughput, and what a client waits for."""
    rows = [
        [
            str(cell["concurrency"]),
            f"`{cell['arm']}`",
            Interval(**cell["throughput"]).text(1),
            Interval(**cell["speedup"]).text(2, "×") if cell["speedup"] else "1",
            *(_milliseconds(cell["latency"][name], key) for name, key in (("ttft", "p50"), ("ttft", "p95"))),
            _milliseconds(cell["latency"]["tpot"], "p50"),
        ]
        for cell in sorted(result["cells"], key=lambda cell: cell["concurrency"])
    ]
    heads = ["in flight", "controller", "tokens/s", "speed-up", "first token, ms", "p95", "per token, ms"]
    return table(heads, rows) + machine(result["environment"])


def first_token(result: Result) -> str:
    """What first tokens wait for, in milliseconds: the 95th percentile, split over the requests near it."""
    rows = []
    for cell in result["cells"]:
        ttft = cell["ttft"]["all"]
        near = ttft["p95"]
        length = f"{near['steps']:.1f} × {1e3 * near['ttft'] / near['steps']:.0f}"
        seconds = (near["begun"], near["admission"] + near["queue"], near["reading"])
        waits = [f"{1e3 * part:.0f}" for part in seconds]
        quantiles = [f"{1e3 * each['quantile']:.0f}" for each in (ttft["p50"], near, cell["ttft"]["steady"]["p95"])]
        rates = [f"{cell['tokens_per_second']:.0f}", f"{1e3 * cell['tpot']:.0f}"]
        rows.append([cell["load"], f"`{cell['arm']}`", *rates, *quantiles, length, *waits])
    heads = ["load", "controller", "tokens/s", "per token", "first token", "p95", "p95 later", "steps × length"]
    return table([*heads, "step under way", "queue", "own prompt"], rows)


def server_identity(result: Result) -> str:
    """Answers through HTTP against the engine's own."""
    rows = [
        [
            f"{cell['temperature']:g}",
            str(cell["requests"]),
            str(cell["tokens"]),
            str(len(cell["in_flight_at_swaps"])),
            f"{min(cell['in_flight_at_swaps'])} to {max(cell['in_flight_at_swaps'])}",
            str(cell["lost"]),
            str(cell["differing"]),
        ]
        for cell in result["cells"]
    ]
    heads = ["temperature", "requests", "tokens", "swaps", "in flight then", "lost", "not the engine's own"]
    return table(heads, rows)


def server_overhead(result: Result) -> str:
    """Throughput through HTTP over that of the engine alone."""
    rows = [
        [
            f"`{entry['controller']}`",
            Interval(**entry["engine"]).text(1),
            Interval(**entry["http"]).text(1),
            Interval(**entry["http_over_engine"]).text(3, "×"),
            f"{entry['engine_busy']:.1%}",
            f"{entry['client_cpu_share']:.1%}",
        ]
        for entry in result["entries"]
    ]
    heads = ["controller", "tokens/s, engine alone", "through HTTP", "ratio", "engine at work", "client, of a core"]
    return table(heads, rows) + machine(result["environment"])


def soak(result: Result) -> str:
    """What the clients of a soak sent and how it ended, then what happened meanwhile."""
    rows = [
        [kind, str(sum(ends.values())), ", ".join(f"{count} {end}" for end, count in _most_first(ends))]
        for kind, ends in result["visits"].items()
    ]
    memory = ", ".join(
        f"{name} {found['trend_mb']:+.1f} MB in {found['seconds'] / 60:.0f} min"
        for name, found in result["memory"].items()
        if found["trend_mb"] is not None
    )
    happened = Counter(event["what"] for event in result["events"])
    words = (
        f"\n{result['seconds'] / 60:.0f} minutes; {', '.join(f'{n} × {what}' for what, n in happened.items())}. "
        f"{result['texts']['compared']} answers compared with the first to the same request, "
        f"{result['texts']['changed']} changed. Trend of memory: {memory}. "
        + "".join(
            f"A controller that {name} made way after {fault['seconds']:.1f} s. "
            for name, fault in result["guard"]["faults"].items()
        )
        + f"Violations: {len(result['violations'])}.\n"
    )
    return table(["what clients did", "times", "how it ended"], rows) + words


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _milliseconds(latency: Mapping[str, float] | None, key: str) -> str:
    return "-" if latency is None else f"{1000 * latency[key]:.0f}"
