"""``report.json`` and ``report.md``: what was run where, what came out, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_rl.utils.result_store import write_json
from scripts.gpu.outcomes import UNREADABLE, Rows, numbers
from scripts.gpu.sglang_stages import INSTALL
from scripts.gpu.steps import FAILED, Stage

WITHOUT_NUMBERS = ("environment", INSTALL)


def write_report(out: Path, here: Mapping[str, Any], stages: Sequence[Stage], state: Mapping[str, Any]) -> None:
    entries = [entry_of(out, stage, state.get(stage.name, {})) for stage in stages]
    write_json(out / "report.json", {"machine": dict(here), "stages": entries})
    text = ["# GPU validation", "", *(f"- {key}: {value}" for key, value in here.items())]
    text += [
        "",
        *table([{"stage": f"`{e['name']}`", "outcome": e["outcome"], "s": f"{e['seconds']:.0f}"} for e in entries]),
    ]
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


def table(rows: Rows) -> Iterator[str]:
    heads = list(rows[0])
    for cells in (heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
