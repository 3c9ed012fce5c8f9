"""Passes of an engine with a device step are timed at its buckets and from its graphs, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echo_rl.calibrate import live
from echo_rl.calibrate.cost import Grid, Machine
from echo_rl.calibrate.device_passes import DevicePasses, Replays, _tree, passes, usual
from echo_rl.contracts import AUTOREGRESSIVE, Request, SamplingParams, SpecPlan
from echo_rl.errors import ConfigError
from echo_rl.runtime.probe import Probe
from echo_rl.runtime.step.device.graphs import Graphs
from echo_rl.runtime.step.device.rule import DevicePlan
from tests import tiny
from tests.runtime.driving import requests
from tests.runtime.step.test_device_graphs import with_graphs
from tests.runtime.step.test_device_step import Ruled

MACHINE = Machine("cpu", "float32", "tiny", 1)
GRID = Grid(batches=(1, 3), rows=(1, 3, 6, 12), contexts=(16, 40), widths=(1, 3), depths=(1, 3), draft_context=20,
            repeats=2)  # fmt: skip


@pytest.fixture
def engine(tmp_path):
    return with_graphs(tiny.engine(tmp_path, step="device"), most=6)


def launched(engine, monkeypatch) -> list:
    """The buckets of the engine's launches from now on, with what their graphs did: (bucket, plain, captured)."""
    seen, launch = [], engine.serving.launch

    def spy(bucket, *rest):
        counts = engine.serving.graphs.counts
        before = counts.plain, counts.captured
        result = launch(bucket, *rest)
        seen.append((bucket, counts.plain - before[0], counts.captured - before[1]))
        return result

    monkeypatch.setattr(engine.serving, "launch", spy)
    return seen


def test_a_pass_is_timed_once_its_graphs_replay(engine, monkeypatch):
    seen = launched(engine, monkeypatch)
    timer = DevicePasses(engine)
    assert timer.verify(3, 3, 30) > 0.0
    assert [row[1:] for row in seen] == [(1, 0), (0, 1), (0, 0)]
    assert timer.verify(3, 3, 50) > 0.0 and len(seen) == 4 and seen[-1][1:] == (0, 0)
    assert timer.draft(3, 2, 4, 30) > 0.0
    assert [row[1:] for row in seen[4:]] == [(2, 0), (0, 2), (0, 0)]
    engine.check_integrity()
    assert engine.block_manager.used_share == 0.0


def test_a_graph_that_was_dropped_is_captured_again_before_it_is_timed(engine, monkeypatch):
    timer = DevicePasses(engine)
    timer.verify(2, 9, 30)
    for rows in (12, 18, 24, 31):  # each has graphs of its own, and few are kept
        timer.verify(2, rows, 30)
    seen = launched(engine, monkeypatch)
    timer.verify(2, 9, 30)
    assert sum(captured for *_, captured in seen) == 2 and seen[-1][1:] == (0, 0)


@pytest.mark.parametrize("batch, rows, requests, nodes", [(3, 3, 3, 0), (3, 11, 3, 8), (2, 13, 2, 11), (1, 60, 3, 57)])
def test_sizes_are_those_of_the_buckets(engine, monkeypatch, batch, rows, requests, nodes):
    """At most 24 nodes a request: 60 rows are at least three requests'."""
    seen = launched(engine, monkeypatch)
    DevicePasses(engine).verify(batch, rows, 20)
    (bucket,) = {row[0] for row in seen}
    assert bucket == engine.serving._buckets.of(requests, requests, DevicePlan.of(_tree(nodes, requests), ()), False)
    assert bucket.nodes >= nodes and bucket.requests >= requests


@pytest.mark.parametrize("each", range(1, 65))
def test_a_tree_holds_what_it_must(each):
    plan = _tree(3 * each - 2, 3)
    assert plan.width + (plan.max_depth - 1) * plan.width**2 >= each and plan.budget == 3 * each - 2
    assert plan.width == 1 or (plan.width - 1) * plan.width < each


def test_what_the_device_cannot_time_is_refused(engine, tmp_path):
    with pytest.raises(ConfigError, match="can't draft 1 levels of width 90"):
        DevicePasses(engine).draft(1, 90, 1, 20)
    with pytest.raises(ConfigError, match="kv_tokens"):
        DevicePasses(engine).verify(60, 60, 200)
    with pytest.raises(ConfigError, match="max_batch_size"):
        DevicePasses(engine).verify(engine.config.max_batch_size + 1, 100, 4)
    assert engine.block_manager.used_share == 0.0
    with pytest.raises(ConfigError, match="--step device"):
        DevicePasses(tiny.engine(tmp_path / "eager", step="eager"))
    assert type(passes(tiny.engine(tmp_path / "eager", step="eager"))) is Probe and type(passes(engine)) is DevicePasses


def test_live_steps_that_captured_are_told_from_the_others(engine):
    told, rows = usual(engine), []
    for plan in (AUTOREGRESSIVE, SpecPlan(9, 3, 2)):
        rule = Ruled(0, fixed=plan)
        for request in requests(2, tokens=12):
            engine.add(replace(request, id=f"{plan.budget}{request.id}"))
        while engine.has_work:
            report = engine.step(rule)
            rows.append((bool(report.load.prefill_tokens), report.load.batch_size, plan.speculates, told(report)))
    steady = [said for prompts, batch, _, said in rows if not prompts and batch == 2]
    assert not steady[0] and not steady[1] and steady[2] and all(steady[2:4])
    again = Replays(engine.serving)
    assert not again.usual(True), "no step since: a step with prompts verifies as launched"


def test_without_graphs_every_step_is_usual(tmp_path):
    plain = tiny.engine(tmp_path, step="device")
    plain.serving.graphs = Graphs(None)
    told = usual(plain)
    plain.add(Request("a", (5, 6, 7), SamplingParams(max_new_tokens=4)))
    while plain.has_work:
        assert told(plain.step(Ruled(0, fixed=SpecPlan(4, 2, 2))))
    assert DevicePasses(plain).verify(1, 5, 20) > 0.0


def test_the_calibration_says_how_it_was_timed(tmp_path, monkeypatch):
    engine = with_graphs(tiny.engine(tmp_path, step="device", max_expanded=96))
    monkeypatch.setattr(live, "LIVE_TOKENS", 6)
    monkeypatch.setattr(live, "calibration_prompts", lambda: ["a", "bc"])
    profile = live.calibrate_cost(engine, MACHINE, GRID, tmp_path / "samples.json", None, "here")
    assert profile.provenance == "here, device step"
    assert (tmp_path / "samples-device.json").is_file() and not (tmp_path / "samples.json").exists()
    eager = live.calibrate_cost(
        tiny.engine(tmp_path / "e", max_expanded=96, step="eager"),
        MACHINE,
        GRID,
        tmp_path / "samples.json",
        None,
        "here",
    )
    assert eager.provenance == "here" and (tmp_path / "samples.json").is_file()
