"""A replay of a recording equals the live engine, step by step, for any controller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echo_rl.contracts import Request, SamplingParams, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.fixed import Chain, ChainOptions, Eagle3, Eagle3Options, Static, StaticOptions
from echo_rl.controllers.echo.echo import EchoOptions, EchoUnscheduled
from echo_rl.controllers.echo.gates import DepthGate, GateCalibration
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, RequestError, TraceError
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.workloads.driver import serve
from tests import tiny

PROMPTS = ((70, 71, 72, 80, 66), (75,) * 9, (66, 67), (80, 81, 82) * 7, (70,), (85, 66) * 11)
OPTIONS = RecordOptions(depth=5, width=4, batch=3)
GATES = GateCalibration(tuple(DepthGate(d, 0.05) for d in range(5)), chosen=(0, 1, 3), score_power=(1.0, 1.1, 1.2))


class Gated(BaseController):
    """A deep, wide plan whose gates stop some requests at every gated level."""

    name = "gated"

    def propose(self, load):
        return SpecPlan(3 * load.batch_size, 5, 4, ((0, 0.08), (1, 0.02), (3, 0.001)))


class Wandering(BaseController):
    """Another shape every step, plain steps among them."""

    name = "wandering"

    def __init__(self):
        super().__init__()
        self.steps = 0

    def propose(self, load):
        self.steps += 1
        shapes = (SpecPlan(0), SpecPlan(2 * load.batch_size, 3, 2), SpecPlan(load.batch_size, 4, 1), SpecPlan(40, 2, 4))
        return shapes[self.steps % len(shapes)]


CONTROLLERS = {
    "chain": lambda: Chain(ChainOptions(steps=4)),
    "eagle3": lambda: Eagle3(Eagle3Options(total=9, depth=4, top_k=3)),
    "static": lambda: Static(StaticOptions(paths=((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))),
    "echo_unscheduled": lambda: EchoUnscheduled(EchoOptions(calibration=GATES, nodes=3.0)),
    "gated": Gated,
    "wandering": Wandering,
}


@pytest.fixture(scope="module")
def costs() -> BatchedCostProfile:
    return BatchedCostProfile(CostProfile.load(packaged("profile.json")))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return tiny.engine(
        tmp_path_factory.mktemp("replay"), block_size=4, prefill_chunk=16, max_nodes=8, max_expanded=OPTIONS.expanded
    )


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        Request(f"tiny/{t}-{i}", prompt, SamplingParams(temperature=t, seed=i, max_new_tokens=20, ignore_eos=True))
        for t in (0.0, 0.8)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def trace(engine, requests, tmp_path_factory) -> Trace:
    return record(engine, requests, frozenset({0}), OPTIONS, tmp_path_factory.mktemp("parts"), "tiny")


def steps(run):
    """What must be equal: everything but times."""
    keep = ("batch_size", "prefill_tokens", "waiting", "context", "budget", "depth", "width", "drafted", "verified")
    counts = ("accepted", "committed", "reached_by_depth", "accepted_by_depth")
    return [tuple(getattr(step, name) for name in keep + counts) for step in run.steps]


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_replay_equals_the_live_engine(engine, trace, requests, costs, name, concurrency):
    live = serve(engine, CONTROLLERS[name](), requests, concurrency)
    limits = ReplaySchedulerOptions(prefill_chunk=16, max_nodes=8)
    backend = ReplayBackend(trace, costs, ReplayOptions(limits))
    replayed = serve(backend, CONTROLLERS[name](), requests, concurrency, clock=backend.clock)
    assert steps(replayed) == steps(live)
    assert [r.tokens for r in replayed.requests] == [r.tokens for r in live.requests]
    assert max(step.verified for step in live.steps) > 0


def test_equal_seeds_take_equal_times(trace, requests, costs):
    def run(seed: int):
        backend = ReplayBackend(trace, costs, seed=seed)
        return serve(backend, Wandering(), requests, 4, clock=backend.clock)

    assert run(1) == run(1)
    assert run(1).seconds != run(2).seconds


def test_a_saved_trace_is_the_same_trace(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    assert again.responses == trace.responses
    for width in (1, 3, 4):
        a, b = again.restricted(width), trace.restricted(width)
        assert (a.scores == b.scores).all() and (a.parents == b.parents).all() and (a.path == b.path).all()


def test_recording_resumes_with_the_missing_parts(engine, trace, requests, tmp_path):
    record(engine, requests, frozenset({0}), OPTIONS, tmp_path, "tiny")
    (tmp_path / "part-0001.safetensors").unlink()
    before = (tmp_path / "part-0000.safetensors").stat().st_mtime_ns
    again = record(engine, requests, frozenset({0}), OPTIONS, tmp_path, "tiny")
    assert again.responses == trace.responses
    assert (tmp_path / "part-0000.safetensors").stat().st_mtime_ns == before
    settings = (tmp_path / "recording.json").read_text()
    (tmp_path / "recording.json").unlink()
    with pytest.raises(ConfigError, match="unknown settings"):
        record(engine, requests, frozenset({0}), OPTIONS, tmp_path, "tiny")
    (tmp_path / "recording.json").write_text(settings)
    longer = [replace(r, params=replace(r.params, max_new_tokens=21)) for r in requests]
    prompts = [replace(r, prompt=r.prompt[1:]) for r in requests]
    for others in (requests[:4], longer, prompts):
        with pytest.raises(ConfigError, match="another requests"):
            record(engine, others, frozenset({0}), OPTIONS, tmp_path, "tiny")


def test_answers_that_end_at_once_are_recorded(engine, requests, tmp_path):
    """A whole part of them holds no position."""
    every = frozenset(range(200))
    mixed = [replace(r, params=replace(r.params, ignore_eos=i >= OPTIONS.batch)) for i, r in enumerate(requests)]
    recorded = record(engine, mixed, every, OPTIONS, tmp_path)
    assert [r.length for r in recorded.responses][: OPTIONS.batch] == [1] * OPTIONS.batch
    assert len(recorded.levels[0].scores) == sum(r.positions for r in recorded.responses) > 0
    with pytest.raises(ConfigError, match="at least 2"):
        record(
            engine, [replace(requests[0], params=SamplingParams(max_new_tokens=1))], every, OPTIONS, tmp_path / "one"
        )


def test_nothing_is_not_recorded(engine, tmp_path):
    with pytest.raises(ConfigError, match="no requests to record"):
        record(engine, [], frozenset({0}), OPTIONS, tmp_path)


def test_a_split_keeps_prompts_apart(trace):
    train, held_out = trace.split(0.4, seed=3)
    assert {r.prompt for r in train.responses}.isdisjoint(r.prompt for r in held_out.responses)
    assert len(train.responses) + len(held_out.responses) == len(trace.responses)
    both = {r: t.restricted(3).scores[t.first[i]] for t in (train, held_out) for i, r in enumerate(t.responses)}
    for i, response in enumerate(trace.responses):
        assert (trace.restricted(3).scores[trace.first[i]] == both[response]).all()


@pytest.mark.parametrize("keep", [0, 40, -100])
def test_a_damaged_file_is_refused(trace, tmp_path, keep):
    path = tmp_path / "t.safetensors"
    trace.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TraceError, match="record"):
        Trace.load(path)


def test_what_was_not_recorded_is_refused(trace, requests, costs):
    backend = ReplayBackend(trace, costs)
    with pytest.raises(RequestError, match="not in the trace"):
        backend.add(replace(requests[0], prompt=(70, 70)))
    backend.add(requests[0])
    with pytest.raises(RequestError, match="in use"):
        backend.add(requests[0])
    with pytest.raises(TraceError, match="--width 9"):
        trace.restricted(9)
    backend.cancel(requests[0].id)
    assert not backend.has_work


def test_one_response_may_be_in_flight_twice(trace, requests, costs):
    twice = [requests[3], replace(requests[3], id="again"), requests[4]]
    backend = ReplayBackend(trace, costs)
    run = serve(backend, Wandering(), twice, 3, clock=backend.clock)
    assert run.requests[0].tokens == run.requests[1].tokens == trace.responses[3].tokens[:20]


def test_forests_have_the_runtime_s_shape(trace):
    recorded = trace.restricted(3)
    assert recorded.scores.shape[1] == recorded.nodes(trace.max_depth) == 3 + 4 * 9
    scores, parents = torch.from_numpy(recorded.scores), torch.from_numpy(recorded.parents)
    above = scores.gather(1, parents.clamp(min=0))
    assert ((parents < 0) | (above >= scores)).all()
