"""Writes the README's tables from the JSON results, so that no number is typed by hand.

Each table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``. ``--check`` changes nothing and
exits with 1 where the README is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common import RESULTS, main
from echo_rl.errors import ConfigError
from echo_rl.metrics import Interval

MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
PENDING = "*Not measured yet: run `make bench`.*\n"
HEADLINE = ("none", "chain", "static", "eagle3", "adaspec", "echo", "ppo")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Args:
    """Render the README's tables."""

    readme: Path = RESULTS.parent.parent / "README.md"
    results: Path = RESULTS
    check: bool = False
    """Only say whether the README is up to date."""


def headline(result: Result) -> str:
    """Tokens/s, MAT and speed-up of the main controllers at each concurrency."""
    rows = [
        [
            str(cell["concurrency"]),
            f"`{cell['arm']}`",
            Interval(**cell["throughput"]).text(1),
            Interval(**cell["speedup"]).text(2, "×") if cell["speedup"] else "1",
            _number(cell["mat"]),
        ]
        for cell in result["cells"]
        if cell["arm"].split(":")[0] in HEADLINE
    ]
    return _table(["in flight", "controller", "tokens/s", "speed-up", "MAT"], rows) + _machine(result["environment"])


def ablations(result: Result) -> str:
    """Speed-ups of ECHO and its ablations, one column a concurrency."""
    loads = sorted({cell["concurrency"] for cell in result["cells"]})
    arms = [arm for arm in dict.fromkeys(cell["arm"] for cell in result["cells"]) if arm.startswith("echo")]
    found = {(cell["arm"], cell["concurrency"]): cell for cell in result["cells"]}
    rows = [[f"`{arm}`", *(Interval(**found[arm, c]["speedup"]).text(2, "×") for c in loads)] for arm in arms]
    return _table(["speed-up", *(str(c) for c in loads)], rows)


def budget(result: Result) -> str:
    """Share of the node budget used, and time spent deciding, by concurrency."""
    rows = []
    for cell in result["cells"]:
        if cell["arm"] == "echo":
            phases = cell["phase_seconds"]
            deciding = (phases["plan"] + phases["select"]) / sum(phases.values())
            used = cell["budget_utilisation"]
            rows.append([str(cell["concurrency"]), "-" if used is None else f"{used:.0%}", f"{deciding:.1%}"])
    return _table(["in flight", "budget used", "time deciding"], rows)


def acceptance(result: Result) -> str:
    rows = [
        [entry["suite"], f"`{entry['arm']}`", Interval(**entry["mat"]).text(), _depths(entry["acceptance_by_depth"])]
        for entry in result["entries"]
    ]
    return _table(["suite", "shape", "MAT", "acceptance at depth 1, 2, ..."], rows)


def plain_decoding(result: Result) -> str:
    rows = [
        [
            str(entry["batch"]),
            entry["arm"],
            Interval(**entry["tokens_per_second"]).text(1),
            "1" if entry["arm"] == "echo-rl" else Interval(**entry["ours_over_it"]).text(2, "×"),
        ]
        for entry in result["entries"]
    ]
    return _table(["batch", "engine", "tokens/s", "ours over it"], rows) + _machine(result["environment"])


def losslessness(result: Result) -> str:
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
    return _table(heads, rows)


def rivals(result: Result) -> str:
    """Geometric means over loads and the speed-up at each load, fastest first."""
    loads = sorted({cell["concurrency"] for cell in result["cells"]})
    found = {(cell["arm"], cell["concurrency"]): cell["speedup"]["estimate"] for cell in result["cells"]}
    rows = [
        [
            str(row["rank"] or "-"),
            f"`{row['arm']}`",
            Interval(**row["speedup"]).text(2, "×"),
            *(_number(found[row["arm"], load]) for load in loads),
        ]
        for row in result["ranking"]
    ]
    return _table(["rank", "controller, tuned", "all loads", *map(str, loads)], rows)


def policies(result: Result) -> str:
    """The learned controller against ECHO and plain serving, workload by workload."""
    names = ("over_echo_by_workload", "hindsight_over_echo", "over_none_by_workload", "echo_over_none")
    rows = [
        [f"`{workload}`", *(Interval(**result[name][i]).text(3, "×") for name in names)]
        for i, workload in enumerate(result["workloads"])
    ]
    rows.append(["all", Interval(**result["over_echo"]).text(3, "×"), "", "", ""])
    heads = ["workload", "`ppo` over `echo`", "best fixed plan over `echo`", "`ppo` over `none`", "`echo` over `none`"]
    return _table(heads, rows)


def training(result: Result) -> str:
    """What each change to the training does to the result."""
    rows = [
        [name, Interval(**interval).text(3, "×")]
        for name, interval in {**result["seeds"], **result["ablations"]}.items()
    ]
    return _table(["training", "over `echo`"], rows)


def fidelity(result: Result) -> str:
    """How a replay's throughput compares with the live loop's."""
    cells: dict[tuple[int, str], list[float]] = {}
    for cell in result["cells"]:
        cells.setdefault((cell["concurrency"], cell["arm"]), []).append(cell["replay"] / cell["live"])
    loads = sorted({load for load, _ in cells})
    arms = dict.fromkeys(arm for _, arm in cells)
    rows = [[f"`{arm}`", *(_number(sum(cells[c, arm]) / len(cells[c, arm])) for c in loads)] for arm in arms]
    taus = ["Kendall's tau", *(_number(result["kendall_tau"][str(load)]) for load in loads)]
    exact, speeds = result["exact"], result["speed"]
    words = (
        f"\nMedian error {result['median_error']:.1%}. In float32 {exact['differed']} of {exact['steps']} steps differ "
        f"from the live loop. Serving steps a second on one core: "
        + ", ".join(f"{speed:,.0f} at batch {batch}" for batch, speed in speeds.items())
        + ".\n"
    )
    return _table(["replayed over live tokens/s", *map(str, loads)], [*rows, taus]) + words


def ab_live(result: Result) -> str:
    """The live A/B of the learned controller against ECHO."""
    (venue,) = result["venues"]
    rows = [
        [
            f"`{cell['workload']}`",
            Interval(**cell["ratios"][cell["headline"]]).text(2, "×"),
            *(_number(arm["mat"]) for arm in cell["arms"]),
        ]
        for cell in venue["cells"]
    ]
    heads = ["workload, live", f"`{result['b']}` over `{result['a']}`", f"MAT `{result['a']}`", f"MAT `{result['b']}`"]
    return _table(heads, rows)


def modelled(result: Result) -> str:
    """Modelled speed-ups over plain decoding: a row per machine and controller, a column a batch size."""
    cells = [(name, cell) for name, machine in result["machines"].items() for cell in machine["cells"]]
    loads = sorted({cell["concurrency"] for _, cell in cells})
    found = {(name, cell["arm"], cell["concurrency"]): cell for name, cell in cells}
    arms = dict.fromkeys((name, cell["arm"]) for name, cell in cells if cell["arm"] != result["baseline"])
    rows = []
    for name, arm in arms:
        last = found[name, arm, loads[-1]]["over_eagle3"]["estimate"]
        speeds = (_number(found[name, arm, load]["speedup"]["estimate"]) for load in loads)
        rows.append([name, f"`{arm}`", *speeds, f"{last - 1:+.1%}"])
    heads = ["modelled, not measured", "controller", *map(str, loads), f"over `eagle3 5/3/3` at {loads[-1]}"]
    return _table(heads, rows) + f"\nAcceptance: {result['trace']}. Costs: a roofline; no GPU was used.\n"


def modelled_break_even(result: Result) -> str:
    """Tokens a request and step at which EAGLE-3's light tree is as fast as plain decoding, with any drafter."""
    rows = [[name, *map(_number, points.values())] for name, points in result["break_even"].items()]
    return _table(["modelled, not measured", *next(iter(result["break_even"].values()))], rows)


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
    return _table(heads, rows) + _machine(result["environment"])


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
    return _table(heads, rows)


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
    return _table(heads, rows) + _machine(result["environment"])


def soak(result: Result) -> str:
    """What the guests of a soak did and how it ended, then what happened meanwhile."""
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
    return _table(["what guests did", "times", "how it ended"], rows) + words


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _milliseconds(latency: Mapping[str, float] | None, key: str) -> str:
    return "-" if latency is None else f"{1000 * latency[key]:.0f}"


TABLES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "headline": ("throughput", headline),
    "ablations": ("throughput", ablations),
    "budget": ("throughput", budget),
    "acceptance": ("acceptance", acceptance),
    "plain_decoding": ("plain_decoding", plain_decoding),
    "losslessness": ("losslessness", losslessness),
    "rivals": ("rivals", rivals),
    "policies": ("policies", policies),
    "training": ("policies", training),
    "fidelity": ("fidelity", fidelity),
    "ab_live": ("ab_live", ab_live),
    "server": ("server", server),
    "server_identity": ("server_identity", server_identity),
    "server_overhead": ("server_overhead", server_overhead),
    "soak": ("soak", soak),
    "modelled": ("roofline", modelled),
    "modelled_break_even": ("roofline", modelled_break_even),
}


def render(text: str, results: Path) -> str:
    """The text with every marked table written anew. Raises `ConfigError` for an unknown name."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ConfigError(f"there is no table called {name}; known: {', '.join(TABLES)}")
        file, make = TABLES[name]
        path = results / f"{file}.json"
        body = make(json.loads(path.read_text())) if path.is_file() else PENDING
        return f"{match[1]}\n{body}\n{match[3]}"

    return MARKED.sub(fill, text)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(environment: Mapping[str, str]) -> str:
    parts = ("cpu", "cores", "device", "dtype", "torch", "model")
    said = ", ".join(f"{part} {environment[part]}" for part in parts if part in environment)
    return f"\nMachine: {said}. Intervals: 95 %, bootstrap over paired blocks.\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _depths(rates: Sequence[float | None]) -> str:
    return ", ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)


def _gap(quantiles: Mapping[str, float] | None) -> str:
    return "-" if quantiles is None else f"{quantiles['median']:.3f}"


def script() -> None:
    args = tyro.cli(Args)
    before = args.readme.read_text()
    after = render(before, args.results)
    if args.check and before != after:
        sys.exit("README.md is out of date; run benchmarks/table.py")
    if not args.check:
        args.readme.write_text(after)


if __name__ == "__main__":
    main(script)
