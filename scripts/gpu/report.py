"""``report.json`` and ``report.md``: what was run where, what came out, and what was not measured."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.report.load import cell
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.utils.result_store import read_lines, write_json
from echo_rl.utils.statistics import Interval
from scripts.gpu.plan import INSTALL, Stage

Row = dict[str, Any]
FAILED = ("failed", "timed out")
"""Outcomes of a stage that went wrong."""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, ElementTree.ParseError)
"""What reading a damaged result may raise."""
WITHOUT_NUMBERS = ("environment", INSTALL)


def write_report(out: Path, here: Mapping[str, Any], stages: Sequence[Stage], state: Mapping[str, Any]) -> None:
    entries = [entry_of(out, stage, state.get(stage.name, {})) for stage in stages]
    write_json(out / "report.json", {"machine": dict(here), "stages": entries})
    overview = [{"stage": f"`{e['name']}`", "outcome": e["outcome"], "s": f"{e['seconds']:.0f}"} for e in entries]
    text = ["# GPU validation", "", *(f"- {key}: {value}" for key, value in here.items()), "", *table(overview)]
    for stage, entry in zip(stages, entries, strict=True):
        text += section(stage, entry)
    (out / "report.md").write_text("\n".join(text) + "\n")


def entry_of(out: Path, stage: Stage, known: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a stage, with its numbers."""
    entry = {"outcome": "not run", "seconds": 0.0, "tail": [], **known, "name": stage.name, "numbers": []}
    if entry["outcome"] in ("done", *FAILED):
        try:
            entry["numbers"] = numbers(stage.name, out / stage.name)
        except UNREADABLE as error:
            entry["tail"] = [*entry["tail"], f"results not readable: {error!r}"]
    return entry


def section(stage: Stage, entry: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## {stage.title}", "", f"`{stage.name}`: **{entry['outcome']}**, {entry['seconds']:.0f} s.")
    if stage.note:
        yield stage.note
    if entry["tail"]:
        yield from ("", "```", *entry["tail"], "```")
    if entry["numbers"]:
        yield "" if entry["outcome"] == "done" else "\nUnfinished:\n"
        yield from table(entry["numbers"])
    elif stage.name not in WITHOUT_NUMBERS:
        yield from ("", "Nothing was measured.")


def table(rows: Sequence[Row]) -> Iterator[str]:
    heads = list(rows[0])
    for cells in (heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# ----------------------------------------------------------------------------- the key numbers of each stage


def numbers(stage: str, folder: Path) -> list[Row]:
    """The rows of a table; none where the stage left none. Raises `UNREADABLE`."""
    if stage.startswith("sglang-"):
        return list(sglang_rows(folder))
    pattern, rows = READERS.get(stage, ("", None))
    paths = sorted(folder.glob(f"**/{pattern}")) if rows else []
    part = [path.relative_to(folder).parts[0].removesuffix(".json") for path in paths]
    return [row for name, path in zip(part, paths, strict=True) for row in rows(name, read(path))]  # type: ignore[misc]


def read(path: Path) -> Any:
    if path.name == "junit.xml":
        return ElementTree.parse(path)
    return CostProfile.load(path) if path.name == "profile.json" else json.loads(path.read_text())


def test_rows(_: str, result: ElementTree.ElementTree) -> Iterator[Row]:
    for suite in result.iter("testsuite"):
        yield {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}


def compile_rows(_: str, result: Any) -> Iterator[Row]:
    used = [use for targets in result["kernels"].values() for use in targets.values()]
    launches = {f"launches a step, {when}": result["totals"][when]["launches"] for when in ("before", "after")}
    yield {"compiled": len(used), "that spill": sum(use["spilled"] > 0 for use in used), **launches}


def timing_rows(_: str, result: Any) -> Iterator[Row]:
    for row in result["kernels"]:
        known, moved = "error" not in row, row.get("bytes_a_second")
        times = {key: f"{1e6 * row[key]['median']:.1f}" if known else "-" for key in ("kernel", "reference")}
        yield {
            "operation": row["name"],
            **{f"{key}, us": text for key, text in times.items()},
            "speed-up": f"{row['speedup']:.1f}x" if known else "-",
            "GB/s": f"{moved / 1e9:.0f}" if moved else "-",
            "error": row.get("error", ""),
        }


def parity_rows(dtype: str, result: Any) -> Iterator[Row]:
    for row in result["rows"]:
        graphs = row.get("graphs", {})
        yield {
            "dtype": dtype,
            "in flight": row["in_flight"],
            "way": row["way"],
            "outputs differing": f"{row['differing']} + {row['differing_again']} of {row['requests']}",
            "steps differing": f"{row['differing_reports']} of {row['steps']}",
            "waits in launches": "-" if row["waits"] is None else row["waits"],
            **{key: graphs.get(key, "-") for key in ("captured", "replayed", "plain", "dropped")},
        }


def calibrate_rows(_: str, costs: CostProfile) -> Iterator[Row]:
    for b in costs.batches:
        yield {"batch": b, "plain pass, ms": f"{1e3 * costs.ar_seconds(b):.2f}", "K_max": costs.knee(b)}


def losslessness_rows(step: str, result: Any) -> Iterator[Row]:
    for dtype, found in result["dtypes"].items():
        keys = ("requests", "tokens", "diverged_requests")
        yield {"step": step, "dtype": dtype, **{key: found[key] for key in keys}}


def bench_rows(step: str, result: Any) -> Iterator[Row]:
    for found in result["cells"]:
        yield {
            "step": step,
            "in flight": found["concurrency"],
            "arm": found["arm"],
            "tokens/s": Interval(**found["throughput"]).text(1),
            "speed-up": Interval(**found["speedup"]).text(2, "x") if found["speedup"] else "1",
            "MAT": f"{found['mat']:.2f}" if found["mat"] else "-",
            "outputs differing": differing(found),
        }


def serve_rows(_: str, result: Any) -> Iterator[Row]:
    return map(load_row, result["cells"])


def sglang_rows(folder: Path) -> Iterator[Row]:
    """A server's load against that without speculation: blocks of the same prompts, though not interleaved."""
    plain = records(folder.parent / "sglang-none")
    for workload, blocks in records(folder).items():
        base = plain.get(workload, []) if folder.name != "sglang-none" else []
        found = cell(blocks, base if len(base) == len(blocks) else None, None)
        yield load_row({"workload": workload, "arm": folder.name.removeprefix("sglang-"), **found})


def load_row(found: Mapping[str, Any]) -> Row:
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
    """The blocks of each workload in order."""
    found: dict[str, list[LoadRecord]] = defaultdict(list)
    for row in sorted(read_lines(folder / "blocks.jsonl"), key=lambda row: int(row["unit"]["block"])):
        found[row["unit"]["workload"]].append(LoadRecord.from_json(row["record"]))
    return found


READERS: Mapping[str, tuple[str, Callable[[str, Any], Iterator[Row]]]] = MappingProxyType(
    {
        "kernels": ("junit.xml", test_rows),
        "runtime": ("junit.xml", test_rows),
        "compile": ("kernels.json", compile_rows),
        "timings": ("timings.json", timing_rows),
        "parity": ("*.json", parity_rows),
        "calibrate": ("profile.json", calibrate_rows),
        "losslessness": ("losslessness.json", losslessness_rows),
        "bench": ("result.json", bench_rows),
        "serve": ("result.json", serve_rows),
    }
)
"""The files that a stage leaves, and how one of them is read."""
