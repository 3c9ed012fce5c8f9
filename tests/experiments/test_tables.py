"""Tables of results: every cell is whole at every width, and a wider terminal shows more of them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from echo_rl.experiments.report import tables
from echo_rl.experiments.report.layout import fitted

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WORDS = re.compile(r"[^\s│┃]+")


def drawn(table, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def result(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


VIEWS = {
    "bench": lambda width: tables.bench(result("throughput"), width),
    "ranking": lambda width: tables.ranking(result("rivals"), width),
    "by_load": lambda width: tables.by_load(result("rivals"), width),
    "load": lambda width: tables.load(result("server"), width),
    "ab": lambda width: tables.ab(result("ab_live")["venues"][0], "eagle3", "echo", width),
}


@pytest.mark.parametrize("width", [80, 100, 130, 200])
@pytest.mark.parametrize("name", VIEWS)
def test_no_cell_is_cut(name, width):
    """Every end of an interval and every ratio is one that the table shows where it has all the room it wants."""
    text = drawn(VIEWS[name](width), width)
    assert "…" not in text and "..." not in text
    assert max(map(len, text.splitlines())) <= width
    whole = set(WORDS.findall(drawn(VIEWS[name](1000), 1000)))
    numbers = [word for word in WORDS.findall(text) if re.fullmatch(r"\[\d[\d.]*,|\d[\d.]*[x\]]", word)]
    assert len(numbers) >= 12 and set(numbers) <= whole


def test_a_wider_terminal_shows_more_columns():
    counts = [len(VIEWS["bench"](width).columns) for width in (80, 110, 200)]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 10


def test_intervals_are_stacked_and_labels_folded_only_where_they_must_be():
    rows = [(("a-controller-with-a-long-name",), {"speed-up": "1.23x [1.20, 1.26]", "more": "123456789"})]
    roomy, narrow = (
        drawn(fitted("", ("controller",), rows, width, kept=1, sections=False), width) for width in (80, 36)
    )
    assert "1.23x [1.20, 1.26]" in roomy and "a-controller-with-a-long-name" in roomy and "123456789" in roomy
    assert "1.23x" in narrow and "[1.20, 1.26]" in narrow and "1.23x [" not in narrow and "123456789" not in narrow
    assert "a-controller-w" in narrow


def test_rows_of_a_section_stand_together():
    rows = [((load, arm), {"value": "1"}) for load in ("1", "2") for arm in ("none", "echo")]
    table = fitted("", ("in flight", "controller"), rows, 80, kept=1, sections=True)
    assert [row.end_section for row in table.rows] == [False, True, False, True]
