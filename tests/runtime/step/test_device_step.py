"""The device step against the eager one: the same plans give the same trees, tokens, reports and cache."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from echo_rl.config import EngineConfig
from echo_rl.contracts import AUTOREGRESSIVE, LoadView, PhaseTimes, Request, SamplingParams, SpecPlan
from echo_rl.controllers.echo.echo import CalibratedSelection
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.selection import pack, per_request_top_k
from echo_rl.errors import ConfigError
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.step.device.step import DeviceStep
from tests import tiny
from tests.runtime.driving import requests, run

POWERS = (0.8, 0.9, 1.3)


class Ruled(CalibratedSelection):
    """Random plans, decided by the plan and the calibration alone."""

    name = "ruled"

    def __init__(self, seed: int, powers: tuple[float, ...] = POWERS, fixed: SpecPlan | None = None) -> None:
        super().__init__(GateCalibration((), (), powers))
        self.rng = random.Random(seed)
        self.fixed = fixed
        self.reports = []

    def propose(self, load: LoadView) -> SpecPlan:
        if self.fixed is not None:
            return self.fixed
        if self.rng.random() < 0.15:
            return AUTOREGRESSIVE
        depth = self.rng.randint(1, 5)
        gates = tuple((d, self.rng.choice((0.01, 0.1, 0.3))) for d in range(depth) if self.rng.random() < 0.5)
        floor = self.rng.choice((0.0, 0.0, 0.001, 0.02))
        return SpecPlan(self.rng.randint(1, 70), depth, self.rng.randint(1, 6), gates, floor)

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        return self.calibration.score_power

    def observe(self, report) -> None:
        self.reports.append(report)


def both(tmp_path_factory, **settings) -> tuple[Engine, Engine]:
    made = []
    for step in ("eager", "device"):
        engine = tiny.engine(tmp_path_factory.mktemp(step), prefill_chunk=16, step=step, **settings)
        engine.trace_trees = True
        made.append(engine)
    return made[0], made[1]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> tuple[Engine, Engine]:
    """Equal weights, eager and on the device."""
    return both(tmp_path_factory)


def assert_equal_reports(expected, got) -> None:
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert b.confidence == pytest.approx(a.confidence, abs=1e-5)
        assert replace(b, times=a.times, confidence=a.confidence) == a


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_serves_exactly_as_the_eager_step(engines, batch, temperature):
    eager, device = engines
    todo = requests(batch, temperature)
    accepted = 0
    for seed in range(3):
        expected, got = Ruled(seed), Ruled(seed)
        assert run(device, got, todo) == run(eager, expected, todo)
        assert_equal_reports(expected.reports, got.reports)
        accepted += sum(r.accepted for r in got.reports)
    assert accepted > 0, "nothing was ever accepted: the test shows nothing"
    assert not device.serving.counts.eager and device.serving.counts.device > 0


@pytest.mark.parametrize("plan", [SpecPlan(6, 5, 1), SpecPlan(3, 1, 4), SpecPlan(60, 4, 6), SpecPlan(2, 5, 6)])
def test_chains_and_trees_of_any_budget(engines, plan):
    eager, device = engines
    todo = requests(5, 0.8)
    expected, got = Ruled(0, fixed=plan), Ruled(0, fixed=plan)
    assert run(device, got, todo) == run(eager, expected, todo)
    assert_equal_reports(expected.reports, got.reports)


def test_gates_stop_the_same_requests(engines):
    """The gate lies among the requests' confidences, so it must part them."""
    eager, device = engines
    gates = ((0, 0.08), (1, 0.03), (2, 0.005))
    expected, got = (Ruled(0, fixed=SpecPlan(80, 5, 3, gates)) for _ in range(2))
    todo = requests(8)
    assert run(device, got, todo) == run(eager, expected, todo)
    assert_equal_reports(expected.reports, got.reports)
    stops = {tree.drafted_depth for r in got.reports for tree in r.trees}
    assert {1, 2, 5} <= stops, "a gate stopped nobody or everybody"


def test_filters_and_mixed_requests(engines):
    eager, device = engines
    todo = [
        *requests(3, 0.9, top_k=5),
        *(replace(r, id=f"p{r.id}") for r in requests(2, 0.9, top_p=0.6)),
        *(replace(r, id=f"n{r.id}", speculate=False) for r in requests(2, 0.7)),
        *(replace(r, id=f"g{r.id}") for r in requests(2, 0.0, top_p=0.5)),
    ]
    expected, got = Ruled(3), Ruled(3)
    outputs = run(device, got, todo)
    assert outputs == run(eager, expected, todo)
    assert_equal_reports(expected.reports, got.reports)
    free = [replace(r, params=replace(r.params, top_k=0, top_p=1.0)) for r in todo]
    assert run(device, Ruled(3), free) != outputs, "the filters changed nothing"


def test_the_smallest_temperatures_are_greedy(engines):
    todo = [*requests(2, 1e-40), *(replace(r, id=f"k{r.id}") for r in requests(2, 1e-50, top_k=3))]
    greedy = [replace(r, params=replace(r.params, temperature=0.0)) for r in todo]
    assert run(engines[1], Ruled(0), todo) == run(engines[0], Ruled(0), greedy)


def test_temperatures_past_float32_draw_what_the_filters_leave(engines):
    todo = requests(2, 1e39, top_k=3)
    assert run(engines[1], Ruled(0), todo) == run(engines[0], Ruled(0), todo)


def test_as_many_prompts_end_as_a_chunk_holds(engines):
    """One-token prompts, a whole chunk of them in one step, beside requests that decode."""
    outputs = []
    for engine in engines:
        for i in range(33):
            engine.add(Request(f"r{i}", (5 + i,), SamplingParams(temperature=0.8, seed=i, max_new_tokens=4, top_k=9)))
        reports = []
        while engine.has_work:
            reports.append(engine.step(Ruled(0, fixed=SpecPlan(24, 2, 2))))
        outputs.append([replace(r, times=PhaseTimes(), confidence=()) for r in reports])
    assert outputs[0] == outputs[1] and outputs[0][0].load.prefill_tokens == 16


def test_the_drafter_catches_up_after_plain_steps(engines):
    eager, device = engines

    class Late(Ruled):
        def propose(self, load: LoadView) -> SpecPlan:
            return SpecPlan(12, 4, 2) if len(self.reports) > 25 else AUTOREGRESSIVE

    expected, got = Late(0), Late(0)
    todo = requests(2, tokens=60)
    assert run(device, got, todo) == run(eager, expected, todo)
    assert_equal_reports(expected.reports, got.reports)


def test_what_only_the_host_can_decide_is_served_by_the_eager_step(tmp_path):
    engine = tiny.engine(tmp_path, step="device")

    class Own(Ruled):
        def score_powers(self, plan):
            return None

        def select(self, forest, plan):
            return pack(forest, per_request_top_k(forest, 1))

    todo = requests(2, 0.8)
    plain = run(engine, Ruled(0, fixed=AUTOREGRESSIVE), todo)
    assert not engine.serving.counts.eager
    plan = SpecPlan(8, 3, 2)
    assert run(engine, Own(0, fixed=plan), todo) == plain
    assert set(engine.serving.counts.eager) == {"controller"}
    run(engine, Ruled(0, fixed=replace(plan, nested=True)), todo)
    run(engine, Ruled(0, fixed=plan), [replace(r, logprobs=2) for r in todo])
    assert {"controller", "nested", "logprobs"} == set(engine.serving.counts.eager)
    device = engine.serving.counts.device
    assert run(engine, Ruled(1), todo) == plain and engine.serving.counts.device > device


def test_a_drafter_that_is_not_there_is_named(tmp_path):
    bare = tiny.engine(tmp_path, drafter=None, step="device")
    bare.add(requests(1)[0])
    bare.step(Ruled(0, fixed=AUTOREGRESSIVE))
    with pytest.raises(ConfigError, match="no drafter"):
        bare.step(Ruled(0, fixed=SpecPlan(4, 2, 2)))
    assert bare.serving.counts.eager == {"drafter": 1} and bare.serving.counts.device == 1


def test_logits_that_are_not_finite_fail_one_request_only(tmp_path):
    engine = tiny.engine(tmp_path, step="device")
    engine.runner.target.embed[200] = float("nan")
    good, bad = (Request(n, (t, 7, 8), SamplingParams(max_new_tokens=6)) for n, t in (("good", 5), ("bad", 200)))
    alone = run(engine, Ruled(0, fixed=AUTOREGRESSIVE), [good])["good"]
    engine.add(good)
    engine.add(bad)
    outputs, reasons = [], {}
    while engine.has_work:
        for output in engine.step(Ruled(0, fixed=SpecPlan(8, 3, 2))).outputs:
            outputs += output.tokens if output.id == "good" else []
            reasons[output.id] = output.finish_reason
        engine.check_integrity()
    assert outputs == alone and reasons == {"good": "length", "bad": "error"}


def test_the_step_is_chosen_once_by_device_or_by_name(tmp_path):
    assert isinstance(tiny.engine(tmp_path).serving, DeviceStep) == tiny.device().startswith("cuda")
    assert not isinstance(tiny.engine(tmp_path, step="eager").serving, DeviceStep)
    assert isinstance(tiny.engine(tmp_path, step="device").serving, DeviceStep)
    with pytest.raises(ConfigError, match="auto, eager or device"):
        EngineConfig(step="graph")


def test_one_wait_a_step(engines):
    _, device = engines
    before, served = device.serving.landing.waits, device.serving.counts.device
    ruled = Ruled(1)
    run(device, ruled, requests(4, 0.8))
    assert device.serving.landing.waits - before == device.serving.counts.device - served == len(ruled.reports)


def test_phases_add_up_to_the_step(engines):
    _, device = engines
    ruled = Ruled(0, fixed=SpecPlan(20, 4, 3))
    run(device, ruled, requests(3))
    for report in ruled.reports:
        assert (report.times.draft > 0) == report.plan.speculates
        assert report.times.verify > 0 and report.times.select == 0.0


def test_the_cache_holds_the_same_rows(engines):
    """Committed keys, values and features equal the eager step's, row by row."""
    seen = []
    for engine in engines:
        todo = requests(3, 0.8, tokens=30)
        for request in todo:
            engine.add(request)
        ruled = Ruled(2, fixed=SpecPlan(20, 4, 3, ((1, 0.02),)))
        for _ in range(9):
            engine.step(ruled)
        sequences = list(engine.scheduler.running)
        assert sequences and sum(r.accepted for r in ruled.reports) > 0
        layout, cache = engine.runner.layout(sequences), engine.runner.cache
        for i, s in enumerate(sequences):
            place = torch.arange(s.kv_len, device=cache.k.device)
            slots = layout.slots(torch.full_like(place, i), place)
            seen.append(torch.cat([t.flatten() for t in (cache.k[:, slots], cache.v[:, slots], cache.features[slots])]))
            drafted = slots[: s.draft_len]
            seen[-1] = torch.cat([seen[-1], cache.draft_k[drafted].flatten(), cache.draft_v[drafted].flatten()])
        for request in todo:
            engine.cancel(request.id)
    half = len(seen) // 2
    for a, b in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
