"""Tables of results: every cell is whole at every width, and a wider terminal shows more of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echo_rl.calibrate.tables import gate_table, knee_table
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.report import tables
from echo_rl.integrations.sglang import doctor
from echo_rl.utils.terminal import BOUNDLESS, fitted
from tests.drawn import columns, drawn, squeezed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def result(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


TUNED = {
    name: {"options": {"depth": 8, "tau": -2.25, "width": depth}, "score": 1.25, "default_score": 1.125, "tried": 24}
    for depth, name in enumerate(("echo", "cost_aware_with_a_long_name"))
}
CHECKS = (
    doctor.Row("SGLang", False, "0.5.1, recorded from 0.5.23; install sglang==0.5.23"),
    doctor.Row("sglang.srt.speculative.eagle_worker.EAGLEWorker.forward_batch_generation", True, "as recorded"),
)
VIEWS = {
    "bench": lambda width: tables.bench(result("throughput"), width),
    "ranking": lambda width: tables.ranking(result("rivals"), width),
    "by_load": lambda width: tables.by_load(result("rivals"), width),
    "load": lambda width: tables.load(result("server"), width),
    "ab": lambda width: tables.ab(result("ab_live")["venues"][0], "eagle3", "echo", width),
    "tuned": lambda width: tables.tuned(TUNED, width),
    "gates": lambda width: gate_table(GateCalibration.load(packaged("gates.json")), width),
    "knees": lambda width: knee_table(CostProfile.load(packaged("profile.json")), width),
    "doctor": lambda width: doctor.table(CHECKS, width),
}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200, BOUNDLESS])
@pytest.mark.parametrize("name", VIEWS)
def test_no_cell_is_cut(name, width):
    """Each column says what it says where there is all the room it wants."""
    view, whole = VIEWS[name](width), VIEWS[name](BOUNDLESS)
    lines, expected = drawn(view, width), columns(drawn(whole, BOUNDLESS))
    assert max(map(len, lines)) <= width
    assert len(expected) == len(whole.columns) >= 3 and not any("…" in line for line in [*lines, *expected])
    if view.box is not None:
        shown = columns(lines)
        assert len(shown) >= 3 and shown == expected[: len(shown)]
    else:
        said = squeezed("".join(lines))
        assert width < 80 and all(squeezed(cell) in said for column in whole.columns for cell in column.cells)


def test_a_wider_terminal_shows_more_columns():
    counts = [len(VIEWS["bench"](width).columns) for width in (80, 110, 200)]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 10


def test_intervals_are_stacked_and_labels_folded_only_where_they_must_be():
    rows = [(("a-controller-with-a-long-name",), {"speed-up": "1.23x [1.20, 1.26]", "more": "123456789"})]
    roomy, narrow = ("\n".join(drawn(fitted("", ("controller",), rows, width, kept=1), width)) for width in (80, 36))
    assert "1.23x [1.20, 1.26]" in roomy and "a-controller-with-a-long-name" in roomy and "123456789" in roomy
    assert "1.23x" in narrow and "[1.20, 1.26]" in narrow and "1.23x [" not in narrow and "123456789" not in narrow
    assert "a-controller-w" in narrow


def test_rows_of_a_section_stand_together():
    rows = [((load, arm), {"value": "1"}) for load in ("1", "2") for arm in ("none", "echo")]
    table = fitted("", ("in flight", "controller"), rows, 80, kept=1, sections=True)
    assert [row.end_section for row in table.rows] == [False, True, False, True]
