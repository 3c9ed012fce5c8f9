"""Buckets and graphs: padding changes nothing, a replay depends on the buffers alone, and there are few of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.config import EngineConfig
from echo_rl.contracts import AUTOREGRESSIVE, SpecPlan
from echo_rl.runtime.step.device.buckets import Buckets, ladder
from echo_rl.runtime.step.device.graphs import Graphs, capture_for
from echo_rl.runtime.step.device.rule import DevicePlan
from echo_rl.runtime.step.device.step import DeviceStep
from tests import tiny
from tests.runtime.driving import requests, run
from tests.runtime.step.test_device_step import Ruled, assert_equal_reports, both


class FakeGraph:
    """Replays a body as a CUDA graph does: with the sizes of its capture, into the result of its capture."""

    def __init__(self, body, result: torch.Tensor) -> None:
        self.body, self.result = body, result

    def replay(self) -> None:
        self.result.copy_(self.body())


def fake_capture(body):
    result = torch.empty_like(body())  # a real capture computes nothing
    return FakeGraph(body, result), result


def with_graphs(engine, most: int = 64):
    """The engine with a device step that captures."""
    engine.serving = DeviceStep(engine.runner, engine.config, engine.serving._eager, capture=fake_capture)
    engine.serving.graphs = Graphs(fake_capture, most)
    return engine


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_replays_serve_exactly_as_the_eager_step(tmp_path_factory, temperature):
    eager, device = both(tmp_path_factory)
    with_graphs(device)
    todo = requests(7, temperature)
    for plan in (SpecPlan(20, 4, 3, ((1, 0.02),)), SpecPlan(9, 3, 1), AUTOREGRESSIVE):
        expected, got = Ruled(0, fixed=plan), Ruled(0, fixed=plan)
        assert run(device, got, todo) == run(eager, expected, todo)
        assert_equal_reports(expected.reports, got.reports)
    counts = device.serving.graphs.counts
    assert counts.replayed > counts.captured > 0 and not counts.dropped


def test_kernels_that_read_results_back_are_not_captured(monkeypatch):
    monkeypatch.setenv("ECHO_KERNELS", "reference")
    assert capture_for(torch.device("cuda")) is None


def test_few_graphs_are_kept(tmp_path):
    device = with_graphs(tiny.engine(tmp_path, prefill_chunk=16, step="device"), most=3)
    plain = run(device, Ruled(0, fixed=AUTOREGRESSIVE), requests(9, 0.8))
    assert run(device, Ruled(1), requests(9, 0.8)) == plain
    assert len(device.serving.graphs) == 3 and device.serving.graphs.counts.dropped > 0


def test_padding_changes_nothing(tmp_path_factory):
    """Every ladder of one far larger step gives the reports of the tight one."""
    tight, loose = (
        tiny.engine(tmp_path_factory.mktemp(n), prefill_chunk=16, step="device") for n in ("tight", "loose")
    )
    buckets = loose.serving._buckets
    buckets.requests, buckets.nodes = (32,), (64 * 24,)
    todo = requests(5, 0.8)
    a, b = Ruled(4), Ruled(4)
    assert run(loose, b, todo) == run(tight, a, todo)
    assert_equal_reports(a.reports, b.reports)


def test_a_body_is_called_then_captured_then_replayed():
    calls = []

    def body() -> torch.Tensor:
        calls.append(1)
        return torch.tensor([len(calls)], dtype=torch.int32)

    graphs = Graphs(fake_capture)
    results = [int(graphs.run("key", body)) for _ in range(4)]
    assert results == [1, 3, 4, 5]  # the second call captures (2) and replays (3)
    assert (graphs.counts.plain, graphs.counts.captured, graphs.counts.replayed) == (1, 1, 3)
    assert int(Graphs(None).run("key", body)) == 6


def test_the_graph_unused_for_longest_is_dropped():
    graphs = Graphs(fake_capture, most=2)
    for key in ("a", "a", "b", "b", "a", "c", "a"):
        graphs.run(key, lambda: torch.zeros(1))
    assert graphs.counts.captured == 2 and graphs.counts.dropped == 1 and graphs.counts.replayed == 4
    graphs.run("b", lambda: torch.zeros(1))
    assert graphs.counts.plain == 4, "b was dropped, so it starts anew"


@given(st.integers(1, 9), st.integers(0, 5000), st.integers(1, 8))
def test_a_ladder_pads_by_a_share(first, more, steps):
    sizes = ladder(first, first + more, steps)
    assert sizes[0] == first and sizes[-1] == first + more and list(sizes) == sorted(set(sizes))
    assert all(b - a <= max(1, a / steps) for a, b in itertools.pairwise(sizes))
    assert len(sizes) <= 2 + first + steps * more.bit_length() + steps * first


@given(st.data())
def test_a_bucket_holds_what_it_is_chosen_for(data):
    config = EngineConfig()
    buckets = Buckets(config.max_batch_size, config.max_nodes)
    decodes = data.draw(st.integers(0, config.max_batch_size))
    drafting = data.draw(st.integers(min(decodes, 1), decodes))
    plan = SpecPlan(data.draw(st.integers(0, 5000)), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 10)))
    bucket = buckets.of(decodes, drafting, DevicePlan.of(plan, ()), False)
    assert bucket.requests >= max(decodes, 1)
    forest = plan.width + (plan.max_depth - 1) * plan.width**2
    need = min(plan.budget, drafting * config.max_nodes, drafting * forest)
    assert bucket.nodes >= need and bucket.nodes <= max(10, 1.25 * need) and bool(bucket.nodes) == plan.speculates


def test_one_shape_needs_few_buckets():
    """All loads of an engine under one tree shape: the number of graphs that could ever be wanted."""
    config = EngineConfig()
    buckets = Buckets(config.max_batch_size, config.max_nodes)
    wanted = {
        buckets.of(batch, batch, DevicePlan.of(SpecPlan(nodes * batch, 4, 4), ()), False)
        for batch in range(1, config.max_batch_size + 1)
        for nodes in range(1, config.max_nodes + 1)
    }
    assert len(wanted) <= len(buckets.requests) * len(buckets.nodes) and len(wanted) < 250
    assert len(buckets.requests) == 12 and len(buckets.nodes) < 45
