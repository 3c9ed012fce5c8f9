"""Reward forms against values worked out by hand; the running speeds; lanes apart from each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.env.reward import RewardMeter, RewardOptions
from echo_rl.errors import ConfigError

FIRST = {"tokens": [4.0, 8.0], "seconds": [2.0, 2.0], "plain_seconds": [1.0, 2.0], "batch": [2.0, 4.0]}
SECOND = {"tokens": [2.0, 4.0], "seconds": [1.0, 2.0], "plain_seconds": [1.0, 2.0], "batch": [2.0, 4.0]}


def meter(form: str, lanes: int = 2, **options: float) -> RewardMeter:
    return RewardMeter(RewardOptions(form, **{"rate": 0.5, "scale": 4.0} | options), lanes)


def score(of: RewardMeter, step: dict[str, list[float]], **more: list[float]) -> dict[str, np.ndarray]:
    return of.score(**{name: np.array(values) for name, values in {**step, **more}.items()})


@pytest.mark.parametrize(
    ("form", "first", "second"),
    [
        # relative: tokens / batch - g * seconds / plain; g begins at 1.
        # lane 0: 2 - 1 * 2; then g = (1 + .5 * (2 - 1)) / (1 + .5 * (2 - 1)) = 1:      1 - 1 * 1
        # lane 1: 2 - 1 * 1; then g = (2 + .5 * (4 - 2)) / (2 + .5 * (2 - 2)) = 1.5:    1 - 1.5 * 1
        ("relative", [0.0, 1.0], [0.0, -0.5]),
        # throughput: (tokens - rho * seconds) / 4; rho begins at batch / plain = 2 and 2.
        # lane 0: (4 - 2 * 2) / 4; then rho = (2 + .5 * 2) / 1.5 = 2:                   (2 - 2 * 1) / 4
        # lane 1: (8 - 2 * 2) / 4; then rho = (4 + .5 * 4) / 2 = 3:                     (4 - 3 * 2) / 4
        ("throughput", [0.0, 1.0], [0.0, -0.5]),
        ("tokens", [2.0, 2.0], [1.0, 1.0]),
        ("time", [-2.0, -1.0], [-1.0, -1.0]),
    ],
)
def test_values_by_hand(form, first, second):
    of = meter(form)
    assert score(of, FIRST)["reward"].tolist() == first
    assert score(of, SECOND)["reward"].tolist() == second


def test_goodput_takes_off_the_share_of_late_requests():
    of = meter("goodput", slo_weight=2.0)
    terms = score(of, FIRST, good=[1.0, 0.25])
    assert terms["penalty"].tolist() == [0.0, -1.5]
    assert terms["reward"].tolist() == [0.0, 1.0 - 1.5]
    with pytest.raises(ConfigError, match="good"):
        score(of, SECOND)


@pytest.mark.parametrize("form", ["relative", "throughput", "tokens", "time", "goodput"])
def test_terms_sum_to_the_reward(form):
    of = meter(form)
    for step in (FIRST, SECOND):
        terms = score(of, step, good=[0.5, 0.75])
        assert set(terms) == {"reward", "gain", "cost", "penalty"}
        assert terms["reward"].tolist() == (terms["gain"] + terms["cost"] + terms["penalty"]).tolist()


def test_running_speeds_move_after_scoring():
    of = meter("relative")
    score(of, FIRST)
    assert of.speedup.tolist() == [1.0, 1.5] and of.throughput.tolist() == [2.0, 3.0]
    score(of, SECOND)
    # lane 1: worth 3 -> 3 + .5 * (2 - 3) = 2.5, tokens 6 -> 5, seconds 2
    assert of.speedup.tolist() == [1.0, 1.25] and of.throughput.tolist() == [2.0, 2.5]


@pytest.mark.parametrize("lane", [0, 1])
def test_a_reset_lane_begins_anew_and_the_other_goes_on(lane):
    of = meter("relative")
    score(of, {**FIRST, "seconds": [1.0, 2.0]})  # both now at a speed-up of 1.5
    of.reset(np.arange(2) == lane)
    assert of.speedup.tolist() == [1.0 if i == lane else 1.5 for i in range(2)]
    # a new episode begins at the usual speed of its load: 1 + .25 * (2 - 1) in plain seconds' worth, 1 in time
    assert of.usual(np.array(SECOND["batch"])).tolist() == [1.25, 1.25]
    expected = [1.0 - (1.25 if i == lane else 1.5) for i in range(2)]
    assert score(of, SECOND)["reward"].tolist() == expected


@pytest.mark.parametrize("form", ["relative", "throughput", "goodput", "tokens", "time"])
def test_a_lane_without_requests_scores_nothing_and_learns_nothing(form):
    of, never = meter(form), meter(form)
    idle = {"tokens": [0.0, 8.0], "seconds": [5.0, 2.0], "plain_seconds": [1.0, 2.0], "batch": [0.0, 4.0]}
    good = [0.5, 1.0]
    assert score(of, idle, good=good)["reward"][0] == 0.0
    assert score(of, FIRST, good=good)["reward"][0] == score(never, FIRST, good=good)["reward"][0]


@given(st.lists(st.tuples(st.floats(1.0, 60.0), st.floats(0.01, 1.0)), min_size=1, max_size=20), st.integers(1, 64))
def test_at_one_load_relative_is_throughput_up_to_a_factor(steps, batch):
    relative, throughput = meter("relative", 1), meter("throughput", 1)
    for tokens, seconds in steps:
        step = {"tokens": [tokens], "seconds": [seconds], "plain_seconds": [0.05], "batch": [float(batch)]}
        expected = score(throughput, step)["reward"][0] * 4.0 / batch
        assert score(relative, step)["reward"][0] == pytest.approx(expected, abs=1e-9)


def test_a_policy_as_fast_as_its_average_earns_nothing_and_a_faster_step_earns():
    of = meter("relative", 1, rate=0.05)
    steady = {"tokens": [12.0], "seconds": [0.1], "plain_seconds": [0.05], "batch": [4.0]}
    for _ in range(400):
        last = score(of, steady)["reward"][0]
    assert last == pytest.approx(0.0, abs=1e-6)
    assert score(of, steady | {"seconds": [0.09]})["reward"][0] > 0.1


@pytest.mark.parametrize(
    "bad", [{"form": "speed"}, {"rate": 0.0}, {"rate": 1.5}, {"scale": 0.0}, {"slo_tpot": -1.0}, {"slo_weight": -1.0},
            {"scale": float("nan")}]
)  # fmt: skip
def test_bad_options_are_refused(bad):
    with pytest.raises(ConfigError):
        RewardOptions(**bad)
