"""What first tokens wait for: the split of a run, and the bound on what speculation may add, in simulated time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import common
from benchmarks.research import first_token
from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers import make
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.targets.backend import Target
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.trace import Trace
from echo_rl.workloads.driver import serve
from echo_rl.workloads.metrics import tokens_per_second, ttft
from tests import tiny

IN_FLIGHT = 64


@pytest.fixture(scope="module")
def target() -> Target:
    """The packaged requests, answers cut at 48 tokens, at the packaged costs."""
    trace, profile = first_token.cut(Trace.packaged(), 48), CostProfile.load(packaged("profile.json"))
    backend = ReplayBackend(trace, BatchedCostProfile(profile), ReplayOptions(noise=False))
    return Target("replay", backend, trace.requests(), backend.clock, backend.idle)


@pytest.fixture(scope="module")
def record(target):
    """The run of a controller with `IN_FLIGHT` requests, by name."""
    setting, profile = first_token.Study(rounds=3), str(packaged("profile.json"))

    def run(name: str):
        options = {} if name == "none" else {"profile": profile}
        return first_token.closed_run(setting, target, make(name, **options), block=0)

    runs = {name: run(name) for name in ("none", "echo", "ppo")}
    return runs.__getitem__


@pytest.mark.parametrize("name", ["echo", "ppo"])
def test_speculation_does_not_delay_first_tokens_in_a_crowd(name, record):
    """Nodes beside prompts cost as much as prompt tokens; priced as if they were free, they add two thirds."""

    def p95(run, begin=0):
        return float(np.percentile([ttft(request) for request in run.requests[begin:]], 95))

    ours, plain = record(name), record("none")
    assert p95(ours) <= 1.1 * p95(plain)
    assert p95(ours, IN_FLIGHT) <= 1.1 * p95(plain, IN_FLIGHT)  # without those that came all at once
    assert tokens_per_second(ours) >= 0.98 * tokens_per_second(plain)
    assert any(step.verified for step in ours.steps if not step.prefill_tokens)


@pytest.mark.parametrize("name", ["none", "echo"])
def test_the_parts_of_a_wait_are_the_whole(name, record):
    check_parts(record(name), first_token.waits(record(name)))


def test_the_split_of_a_live_run_tells_who_waited_for_a_place(tmp_path):
    engine = tiny.engine(tmp_path, prefill_chunk=16, max_batch_size=3)
    sizes = (5, 40, 7, 16, 33, 3, 21, 12)
    params = SamplingParams(max_new_tokens=6)
    requests = [Request(str(i), tuple(range(66, 66 + size)), params) for i, size in enumerate(sizes)]
    found = serve(engine, make("chain", steps=2), requests, concurrency=8)
    waits = first_token.waits(found)
    check_parts(found, waits)
    assert [wait.admission > 0.0 for wait in waits] == [i >= 3 for i in range(8)]
    assert [wait.reads for wait in waits[:3]] == [1, 3, 2] and waits[2].queue > 0.0  # 5 and 11, 16, 13 and 3, 4


def check_parts(record, waits) -> None:
    assert len(waits) == len(record.requests)
    for wait, request in zip(waits, record.requests, strict=True):
        parts = [getattr(wait, part) for part in first_token.PARTS]
        assert min(parts) >= -1e-9 and sum(parts) == pytest.approx(wait.ttft, abs=1e-6)
        assert wait.ttft == ttft(request) and 1 <= wait.reads <= wait.steps


def test_the_script_writes_every_arm_under_both_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(first_token, "CONSOLE", Console(quiet=True))
    monkeypatch.setattr("sys.argv", ["script", "--quick"])
    first_token.script()
    cells = json.loads((tmp_path / "quick" / "first_token.json").read_text())["cells"]
    assert {(cell["load"], cell["arm"]) for cell in cells} == {
        (load, arm) for load in ("closed", "open") for arm in ("none", "echo", "ppo")
    }
    for cell in cells:
        quantile = cell["ttft"]["all"]["p95"]
        assert quantile["quantile"] > 0 and cell["goodput"] > 0 and cell["step"]["reading"] > 0
