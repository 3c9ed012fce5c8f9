"""The demo under a virtual clock: its time, its work and its intervals on machines of any speed."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.experiments.demo import AIM, ARMS, BLOCKS, SHAPES, TOKENS, TRIAL_TOKENS, WIDE, Fit, remarks, run_demo
from echo_rl.experiments.report.measures import decoding_rates
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.driver import serve
from tests.conftest import FakeController, FakeEngine

PROMPTS = [Prompt("gsm8k", str(i), ({"role": "user", "content": "x" * (i + 1)},)) for i in range(40)]
SECONDS = 120.0
GAINS = {"none": 0, "eagle3": 3, "echo": 1}


def make(name: str) -> FakeController:
    return FakeController(name, GAINS[name])


class Machine(FakeEngine):
    """Steps take `step_seconds` times noise, `heavy` times as long under full trees; prompts are read in one step."""

    def __init__(self, step_seconds: float, noise: float = 0.0, heavy: float = 6.0, seed: int = 0) -> None:
        super().__init__(step_seconds=step_seconds)
        self.usual, self.noise, self.heavy = step_seconds, noise, heavy
        self.random = np.random.default_rng(seed)

    def step(self, controller):
        slow = self.heavy if controller.name == "eagle3" and len(self.live) > 1 else 1.0
        self.step_seconds = self.usual * slow * float(self.random.lognormal(0.0, self.noise))
        return super().step(controller)


def demo(machine: FakeEngine, seconds: float = SECONDS, prompts=PROMPTS):
    begun = machine.clock()
    result = run_demo(machine, prompts, make, seconds, {"dtype": "float32"}, clock=machine.clock)
    return result, machine.clock() - begun


def cell(result, arm: str, concurrency: int = 16):
    return next(c for c in result["cells"] if (c["arm"], c["concurrency"]) == (arm, concurrency))


def work(result) -> tuple[int, int]:
    """Tokens of a request in the largest batch, and blocks."""
    load = result["config"]["loads"][-1]
    return load["max_new_tokens"], load["blocks"]


@pytest.mark.parametrize("step_seconds", [0.001, 0.01, 0.03, 0.05, 0.1, 0.25])
def test_it_ends_in_time_on_machines_of_any_speed(step_seconds):
    result, took = demo(Machine(step_seconds))
    assert took <= SECONDS
    tokens, blocks = work(result)
    assert TOKENS[0] <= tokens <= TOKENS[1] and BLOCKS[0] <= blocks <= BLOCKS[1]
    assert all(c["throughput"]["blocks"] == blocks for c in result["cells"])
    assert len(result["cells"]) == len(ARMS) * len(SHAPES)


def test_a_slower_machine_gets_less_work_and_a_fast_one_the_most():
    fast, usual, slow = (work(demo(Machine(seconds))[0]) for seconds in (0.001, 0.05, 0.25))
    assert fast == (TOKENS[1], BLOCKS[1])
    assert TOKENS[0] < usual[0] < TOKENS[1] and AIM <= usual[1] < BLOCKS[1]
    assert slow[0] == TOKENS[0] and BLOCKS[0] <= slow[1] < BLOCKS[1]


def test_a_machine_that_slows_down_serves_whole_blocks_and_fewer_of_them():
    class Tiring(Machine):
        def step(self, controller):
            self.usual = 0.05 if self.clock.now < 130.0 else 0.15
            return super().step(controller)

    result, took = demo(Tiring(0.05))
    tokens, blocks = work(result)
    assert BLOCKS[0] <= blocks < BLOCKS[1] and took <= 1.2 * SECONDS
    for c in result["cells"]:
        count, times = SHAPES[c["concurrency"]]
        assert (c["requests"], c["output_tokens"]) == (blocks * count, blocks * count * times * tokens)


def test_a_machine_on_which_nothing_fits_serves_the_fewest_blocks_and_says_so():
    result, took = demo(Machine(5.0, noise=0.5))
    assert work(result) == (TOKENS[0], BLOCKS[0]) and took > SECONDS
    (_, warning) = remarks(result)
    assert "wider than ±15%" in warning and "--seconds" in warning


def test_arms_serve_the_same_prompts_to_the_same_length_in_every_block():
    machine = Machine(0.05)
    result, _ = demo(machine)
    _, blocks = work(result)
    names = {arm: [request for name, request in machine.served if name == arm] for arm in ARMS}
    assert names == dict.fromkeys(ARMS, names["none"])
    turns = [arm for arm, _ in groupby(arm for arm, _ in machine.served)]
    assert turns[-2:] != turns[-4:-2] and max(Counter(turns).values()) - min(Counter(turns).values()) <= blocks // 2
    assert len(names["none"]) == (blocks + 1) * sum(count for count, _ in SHAPES.values())  # and once in the trial
    assert all(c["outputs"]["differing"] == 0 for c in result["cells"])


def test_a_rate_is_of_full_batches_that_read_nothing():
    """16 requests, one step to read them; three plain steps at 2 s, then the batch is smaller."""
    machine = Machine(2.0)
    requests = [Request(str(n), (1,), SamplingParams(max_new_tokens=4 + 5 * (n == 0))) for n in range(16)]
    run = serve(machine, make("none"), requests, 16, clock=machine.clock)
    reading = sum(step.prefill_tokens > 0 for step in run.steps)
    (rate,) = decoding_rates([run])
    assert (rate.amount, rate.seconds) == (16 * 3, 6.0) and len(run.steps) > 4 and reading <= 1


def test_ratios_are_those_of_decoding_and_no_reading_dilutes_them():
    result, _ = demo(Machine(0.05))
    assert cell(result, "echo")["speedup"]["estimate"] == pytest.approx(2.0, rel=0.15)
    assert cell(result, "eagle3")["speedup"]["estimate"] == pytest.approx(4 / 6, rel=0.15)
    assert cell(result, "eagle3", 1)["speedup"]["estimate"] == pytest.approx(4.0, rel=0.15)


def test_intervals_are_narrow_and_hold_the_truth_on_a_noisy_machine():
    """By the run's own clock, with steps that vary by a fifth: the seeds decide, so this is no matter of luck."""
    held, truth = 0, cell(demo(Machine(0.04))[0], "echo")["speedup"]["estimate"]
    for seed in range(8):
        result, took = demo(Machine(0.04, noise=0.2, seed=seed))
        found = cell(result, "echo")["speedup"]
        assert took <= 1.1 * SECONDS and len(remarks(result)) == 1
        assert found["high"] / found["estimate"] - 1 <= WIDE and 1 - found["low"] / found["estimate"] <= WIDE
        held += found["low"] <= truth <= found["high"]
    assert held >= 7


def test_a_fit_is_by_what_reading_and_decoding_took():
    """One step of 1 s to read and five of 1 s to decode: a block of n tokens takes n seconds."""
    machine = Machine(1.0)
    requests = [Request("r", (1,), SamplingParams(max_new_tokens=TRIAL_TOKENS))]
    trial = serve(machine, make("none"), requests, 1, clock=machine.clock)
    assert Fit.of([trial], 180.0) == Fit(30, AIM)
    assert Fit.of([trial], 40.0) == Fit(TOKENS[0], 5)
    assert Fit.of([trial], 0.0) == Fit(TOKENS[0], BLOCKS[0])
    assert Fit.of([trial], 1e6) == Fit.of([], 1.0) == Fit(TOKENS[1], BLOCKS[1])


@pytest.mark.parametrize(("seconds", "prompts"), [(0.0, PROMPTS), (-1.0, PROMPTS), (float("inf"), PROMPTS), (9.0, [])])
def test_no_time_and_no_prompts_are_refused(seconds, prompts):
    with pytest.raises(ConfigError, match="shows nothing; give seconds and prompts"):
        demo(Machine(1.0), seconds, prompts)
