"""The cost record: interpolation, the knee, the hinge, the file format."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

BATCHES, ROWS, CONTEXTS = (1, 4, 16), (1, 2, 4, 8, 16, 24, 32, 64), (100, 1000)
WIDTHS, DEPTHS = (1, 10), (1, 2, 8)


def surface_of(k_rows=16, gamma=0.1, base=0.01):
    """``base * (1 + gamma * max(0, rows - k_rows))``, plus 1 us a token of context."""

    def seconds(batch, rows, context):
        return base * (1 + gamma * max(0, max(rows, batch) - k_rows)) + 1e-6 * context

    return tuple(tuple(tuple(seconds(b, r, c) for c in CONTEXTS) for r in ROWS) for b in BATCHES)


def profile_of(**changes):
    draft = tuple(tuple(tuple(1e-3 * d * (1 + w / 10) for d in DEPTHS) for w in WIDTHS) for _ in BATCHES)
    fields = {
        "device": "cpu", "dtype": "bfloat16", "model": "test", "threads": 2,
        "batches": BATCHES, "rows": ROWS, "contexts": CONTEXTS, "verify": surface_of(),
        "draft_batches": BATCHES, "widths": WIDTHS, "depths": DEPTHS, "draft": draft,
        "step_overhead": 0.001, "spec_overhead": 0.0005, "noise": 0.05, "provenance": "synthetic",
    }  # fmt: skip
    return CostProfile(**fields | changes)


PROFILE = profile_of()


def test_knots_are_returned_exactly():
    for i, batch in enumerate(BATCHES):
        for j, rows in enumerate(ROWS):
            if rows >= batch:
                assert PROFILE.verify_seconds(batch, rows, 100) == PROFILE.verify[i][j][0]


def test_linear_between_and_past_the_knots():
    assert PROFILE.verify_seconds(1, 20, 550) == pytest.approx(0.01 * 1.4 + 550e-6)
    assert PROFILE.verify_seconds(1, 128, 100) == pytest.approx(0.01 * (1 + 0.1 * 112) + 100e-6)
    assert PROFILE.draft_seconds(2, 1, 5) == pytest.approx(1.1e-3 * 5)
    assert PROFILE.draft_seconds(2, 1, 12) == pytest.approx(1.1e-3 * 12)
    assert PROFILE.draft_seconds(2, 1, 0) == 0.0


def test_fewer_rows_than_requests_means_the_roots():
    assert PROFILE.verify_seconds(16, 3, 100) == PROFILE.ar_seconds(16, 100)


def test_a_step_adds_its_parts():
    assert PROFILE.step_seconds(4, 0, 3, 3, 100) == pytest.approx(PROFILE.ar_seconds(4, 100) + 0.001)
    parts = PROFILE.verify_seconds(4, 12, 100) + PROFILE.draft_seconds(4, 3, 3) + 0.0015
    assert PROFILE.step_seconds(4, 8, 3, 3, 100) == pytest.approx(parts)


@given(batch=st.integers(1, 40), rows=st.integers(1, 300), more=st.integers(0, 50), context=st.floats(0, 5000))
def test_verify_is_monotone(batch, rows, more, context):
    assert PROFILE.verify_seconds(batch, rows, context) <= PROFILE.verify_seconds(batch, rows + more, context) + 1e-15
    assert PROFILE.verify_seconds(batch, rows, context) <= PROFILE.verify_seconds(batch, rows, context + more) + 1e-15


@given(batch=st.integers(1, 40), width=st.integers(1, 20), depth=st.integers(0, 12), more=st.integers(0, 5))
def test_draft_is_monotone(batch, width, depth, more):
    assert PROFILE.draft_seconds(batch, width, depth) <= PROFILE.draft_seconds(batch, width, depth + more) + 1e-15
    assert PROFILE.draft_seconds(batch, width, depth) <= PROFILE.draft_seconds(batch, width + more, depth) + 1e-15


def test_the_knee_is_where_nodes_stop_paying():
    steep = profile_of(verify=surface_of(gamma=0.4))
    assert [steep.knee(b, 100, theta=0.3) for b in BATCHES] == [15, 12, 0]
    # a node past the hinge costs 0.1 tokens: still worth it, to the grid's end
    assert PROFILE.knee(1, 100, theta=0.3) == 63
    assert PROFILE.knee(1, 100, theta=0.05) == 15
    assert PROFILE.knee(16, 100, theta=0.3) == 0
    assert PROFILE.knee(16, 100, theta=2.0) == 48


def test_prompt_rows_use_up_what_nodes_would_have_for_free():
    steep = profile_of(verify=surface_of(gamma=0.4))
    assert [steep.knee(4, 100, theta=0.3, beside=rows) for rows in (0, 4, 12, 500)] == [12, 4, 0, 0]
    assert [steep.knee(4, 100, theta=2.0, beside=rows) for rows in (0, 12, 500)] == [60, 60, 60], "a node always pays"


@pytest.mark.parametrize("batch", BATCHES)
def test_the_hinge_is_recovered(batch):
    fitted = profile_of(verify=surface_of(k_rows=20, gamma=0.3)).hinge(batch)
    assert fitted.k_max == 20 - batch
    assert fitted.gamma == pytest.approx(0.3 * 0.01 / (0.01 + 100e-6))
    assert fitted.error < 1e-9


def test_a_flat_surface_has_no_hinge():
    fitted = profile_of(verify=surface_of(gamma=0.0)).hinge(1)
    assert fitted.gamma == pytest.approx(0.0, abs=1e-12)


def test_round_trip(tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    assert CostProfile.load(tmp_path / "profile.json") == PROFILE


def test_the_packaged_profile_says_where_it_is_from():
    assert CostProfile.default().provenance


def damaged(tmp_path, change):
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=99), "version 99"),
        (lambda r: r.update(kind="gate calibration"), "not a cost profile"),
        (lambda r: r["body"].pop("rows"), "rows"),
        (lambda r: r["body"].update(surprise=1), "surprise"),
        (lambda r: r["body"].update(noise=-1), "noise"),
        (lambda r: r["body"].update(rows=[2, 1]), "increasing"),
        (lambda r: r["body"]["verify"].pop(), "shape"),
        (lambda r: r["body"]["verify"][0][0].__setitem__(0, None), "not a usable"),
        (lambda r: r["body"]["verify"][0][-1].__setitem__(0, 1e-9), "decreases"),
        (lambda r: r["body"]["verify"][0][0].__setitem__(0, float("inf")), "not positive and finite"),
        (lambda r: r["body"].update(verify=3), "not a usable"),
    ],
)
def test_corrupt_files_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        CostProfile.load(damaged(tmp_path, change))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        CostProfile.load(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"kind": "cost pro')
    with pytest.raises(ConfigError, match="not valid JSON"):
        CostProfile.load(tmp_path / "cut.json")
