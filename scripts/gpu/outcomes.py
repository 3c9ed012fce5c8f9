"""The key numbers that a stage left in its folder, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.load.record import LoadRecord
from echo_rl.experiments.load.report import cell
from echo_rl.utils.result_store import read_lines
from echo_rl.utils.statistics import Interval

Rows = list[dict[str, Any]]
UNREADABLE = (OSError, ValueError, LookupError, TypeError, ElementTree.ParseError)
"""What reading a damaged result may raise."""


def numbers(stage: str, folder: Path) -> Rows:
    """The rows of a stage; none where it left none. Raises `UNREADABLE`."""
    read = READERS.get(stage, sglang_rows if stage.startswith("sglang-") else none)
    return list(read(folder))


def none(folder: Path) -> Iterator[dict[str, Any]]:
    del folder
    return iter(())


def test_rows(folder: Path) -> Iterator[dict[str, Any]]:
    if (folder / "junit.xml").is_file():
        for suite in ElementTree.parse(folder / "junit.xml").iter("testsuite"):
            yield {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}


def compile_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for _, result in results(folder, "kernels.json"):
        used = [use for targets in result["kernels"].values() for use in targets.values()]
        launches = {f"launches a step, {when}": result["totals"][when]["launches"] for when in ("before", "after")}
        yield {"compiled": len(used), "that spill": sum(use["spilled"] > 0 for use in used), **launches}


def timing_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for _, result in results(folder, "timings.json"):
        for row in result["kernels"]:
            known = "error" not in row
            kernel, reference = (1e6 * row[k]["median"] for k in ("kernel", "reference")) if known else (0.0, 0.0)
            moved = row.get("bytes_a_second")
            yield {
                "operation": row["name"],
                "kernel, us": f"{kernel:.1f}" if known else "-",
                "reference, us": f"{reference:.1f}" if known else "-",
                "speed-up": f"{row['speedup']:.1f}x" if known else "-",
                "GB/s": f"{moved / 1e9:.0f}" if moved else "-",
                "error": row.get("error", ""),
            }


def parity_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path, result in results(folder, "*.json"):
        for row in result["rows"]:
            graphs = row.get("graphs", {})
            yield {
                "dtype": path.stem,
                "in flight": row["in_flight"],
                "way": row["way"],
                "outputs differing": f"{row['differing']} + {row['differing_again']} of {row['requests']}",
                "steps differing": f"{row['differing_reports']} of {row['steps']}",
                "waits in launches": "-" if row["waits"] is None else row["waits"],
                **{key: graphs.get(key, "-") for key in ("captured", "replayed", "plain", "dropped")},
            }


def calibrate_rows(folder: Path) -> Iterator[dict[str, Any]]:
    if (folder / "profile.json").is_file():
        costs = CostProfile.load(folder / "profile.json")
        for b in costs.batches:
            yield {"batch": b, "plain pass, ms": f"{1e3 * costs.ar_seconds(b):.2f}", "K_max": costs.knee(b)}


def losslessness_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path, result in results(folder, "losslessness.json"):
        for dtype, found in result["dtypes"].items():
            keys = ("requests", "tokens", "diverged_requests")
            yield {"step": path.relative_to(folder).parts[0], "dtype": dtype, **{key: found[key] for key in keys}}


def bench_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path, result in results(folder, "result.json"):
        for found in result["cells"]:
            yield {
                "step": path.relative_to(folder).parts[0],
                "in flight": found["concurrency"],
                "arm": found["arm"],
                "tokens/s": Interval(**found["throughput"]).text(1),
                "speed-up": Interval(**found["speedup"]).text(2, "x") if found["speedup"] else "1",
                "MAT": f"{found['mat']:.2f}" if found["mat"] else "-",
                "outputs differing": differing(found),
            }


def serve_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for _, result in results(folder, "result.json"):
        yield from map(load_row, result["cells"])


def sglang_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A server's load against that without speculation: blocks of the same prompts, though not interleaved."""
    plain = records(folder.parent / "sglang-none")
    for workload, blocks in records(folder).items():
        base = plain.get(workload, []) if folder.name != "sglang-none" else []
        found = cell(blocks, base if len(base) == len(blocks) else None, None)
        yield load_row({"workload": workload, "arm": folder.name.removeprefix("sglang-"), **found})


def load_row(found: Mapping[str, Any]) -> dict[str, Any]:
    ratio, latency = found["ratios"].get("tokens_per_second"), found["latency"]
    return {
        "workload": found["workload"],
        "arm": found["arm"],
        "tokens/s": Interval(**found["rates"]["tokens_per_second"]).text(1),
        "against none": Interval(**ratio).text(2, "x") if ratio else "-",
        **{f"{n}, ms p50": f"{1e3 * latency[n]['p50']:.1f}" if latency[n] else "-" for n in ("ttft", "tpot")},
        "outputs differing": differing(found),
        "failed": sum(found["errors"].values()),
    }


def differing(found: Mapping[str, Any]) -> str:
    outputs = found["outputs"]
    return f"{outputs['differing']} of {outputs['requests']}" if outputs else "-"


def records(folder: Path) -> dict[str, list[LoadRecord]]:
    """By workload, the blocks in order."""
    found: dict[str, list[LoadRecord]] = {}
    for row in sorted(read_lines(folder / "blocks.jsonl"), key=lambda row: int(row["unit"]["block"])):
        found.setdefault(row["unit"]["workload"], []).append(LoadRecord.from_json(row["record"]))
    return found


def results(folder: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob(f"**/{name}")):
        yield path, json.loads(path.read_text())


READERS: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = MappingProxyType(
    {
        "kernels": test_rows,
        "runtime": test_rows,
        "compile": compile_rows,
        "timings": timing_rows,
        "parity": parity_rows,
        "calibrate": calibrate_rows,
        "losslessness": losslessness_rows,
        "bench": bench_rows,
        "serve": serve_rows,
    }
)
"""By stage; those of SGLang have one reader."""
