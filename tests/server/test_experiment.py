"""The switchback's arithmetic and rules, told hand-made steps."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.errors import ConfigError
from echo_rl.server.config import ExperimentOptions
from echo_rl.server.core.experiment import CARRY_OVER, CONTROL, PAIRS_FOR_HARM, TREATMENT, Switchback
from echo_rl.utils.statistics import Rate, rate_ratio


def options(**changes) -> ExperimentOptions:
    return ExperimentOptions(**{"control": "none", "treatment": "echo", "block_seconds": 1.0, "blocks": 6, **changes})


def run(
    experiment: Switchback, speeds, step_seconds: float = 0.125, noise: random.Random | None = None, most: int = 10**5
):
    """Feeds steps, each arm at its tokens a second, until it is over; returns the arm of each step."""
    arms = []
    while experiment.state == "running" and len(arms) < most:
        arms.append(experiment.arm)
        factor = noise.lognormvariate(0.0, 0.1) if noise else 1.0
        experiment.step(round(1000 * speeds[experiment.arm] * step_seconds * factor), step_seconds)
    return arms


def test_blocks_come_in_pairs_of_both_arms_in_a_drawn_order():
    experiment = Switchback(options(blocks=40))
    arms = run(experiment, {CONTROL: 1.0, TREATMENT: 1.0})
    steps = CARRY_OVER + 8
    blocks = [arms[i] for i in range(0, len(arms), steps)]
    assert len(blocks) == 80 and all(set(arms[i : i + steps]) == {arms[i]} for i in range(0, len(arms), steps))
    pairs = [tuple(blocks[i : i + 2]) for i in range(0, 80, 2)]
    assert set(pairs) == {(CONTROL, TREATMENT), (TREATMENT, CONTROL)}
    assert 10 < pairs.count((CONTROL, TREATMENT)) < 30
    assert arms == run(Switchback(options(blocks=40)), {CONTROL: 1.0, TREATMENT: 1.0}), "the seed decides"
    assert arms != run(Switchback(options(blocks=40, seed=1)), {CONTROL: 1.0, TREATMENT: 1.0})


def test_the_first_steps_of_a_block_do_not_count():
    experiment = Switchback(options(blocks=1, block_seconds=0.3))
    for _ in range(2):
        for _ in range(CARRY_OVER):
            assert not experiment.step(10**6, 5.0)
        tokens = 2 if experiment.arm == CONTROL else 3
        assert [experiment.step(tokens, 0.1) for _ in range(3)] == [False, False, True]
    report = experiment.report()
    assert report["tokens_per_second"] == {CONTROL: pytest.approx(20.0), TREATMENT: pytest.approx(30.0)}
    assert report["ratio"]["estimate"] == pytest.approx(1.5)
    assert report["ratio"]["low"] is None, "one pair makes no interval"
    assert (report["state"], report["reason"]) == ("done", "1 blocks of each arm are done")


def test_the_interval_is_that_of_paired_blocks():
    experiment = Switchback(options(blocks=5))
    rng = random.Random(1)
    blocks = {CONTROL: [], TREATMENT: []}
    while experiment.state == "running":
        arm, tokens, seconds = experiment.arm, 0, 0.0
        ended = False
        steps = 0
        while not ended:
            n, s = rng.randint(1, 30), rng.uniform(0.05, 0.2)
            ended = experiment.step(n, s)
            steps += 1
            if steps > CARRY_OVER:
                tokens, seconds = tokens + n, seconds + s
        blocks[arm].append(Rate(tokens, seconds))
    expected = rate_ratio(blocks[TREATMENT], blocks[CONTROL])
    assert experiment.interval() == expected
    assert experiment.report()["ratio"] == {
        "estimate": expected.estimate,
        "low": expected.low,
        "high": expected.high,
        "pairs": 5,
    }


def test_a_slower_treatment_is_stopped_as_soon_as_it_is_sure():
    experiment = Switchback(options(blocks=100))
    run(experiment, {CONTROL: 1.0, TREATMENT: 0.6}, noise=random.Random(0))
    assert experiment.state == "harm"
    assert PAIRS_FOR_HARM <= experiment.pairs < 10
    assert "slower" in experiment.reason


def test_harm_is_what_the_operator_calls_so():
    speeds = {CONTROL: 1.0, TREATMENT: 0.9}
    assert run(tolerant := Switchback(options(harm=0.5)), speeds) and tolerant.state == "done"
    assert run(never := Switchback(options(harm=0.0)), {CONTROL: 1.0, TREATMENT: 0.01}) and never.state == "done"


def test_equal_arms_are_hardly_ever_called_harmful():
    wrong = 0
    for seed in range(60):
        experiment = Switchback(options(blocks=12, seed=seed))
        run(experiment, {CONTROL: 1.0, TREATMENT: 1.0}, noise=random.Random(seed))
        wrong += experiment.state == "harm"
    assert wrong <= 3, "2.5 % of all experiments at most, however often one looks"


def test_arms_that_clients_keep_equally_busy_are_told_apart_by_how_fast_they_answer():
    """10 tokens a second come in, whoever decides; the treatment has half as many requests in its batch at a time."""
    experiment = Switchback(options(blocks=4))
    while experiment.state == "running":
        experiment.step(10, 1.0, running=4 if experiment.arm == CONTROL else 2)
    report = experiment.report()
    assert report["tokens_per_second"] == {CONTROL: 10.0, TREATMENT: 10.0}
    assert report["tokens_per_request_second"] == {CONTROL: 2.5, TREATMENT: 5.0}
    assert report["ratio"]["estimate"] == 2.0


def test_a_block_without_a_token_does_not_end():
    experiment = Switchback(options())
    for _ in range(100):
        assert not experiment.step(0, 1.0)
    assert experiment.step(1, 1.0)


def test_once_over_it_stays_as_it_ended():
    experiment = Switchback(options())
    experiment.stop("by hand")
    experiment.stop("again", "harm")
    assert not experiment.step(5, 100.0)
    assert (experiment.state, experiment.reason) == ("stopped", "by hand")


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.0, 2.0)), max_size=300), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=60)
def test_arms_never_differ_by_more_than_a_block_and_reports_are_json(steps, blocks, seed):
    experiment = Switchback(options(blocks=blocks, seed=seed, harm=0.0))
    for tokens, seconds in steps:
        arm = experiment.arm
        ended = experiment.step(tokens, seconds)
        assert ended or experiment.arm == arm
        report = experiment.report()
        json.dumps(report, allow_nan=False)
        counts = report["blocks"]
        assert abs(counts[CONTROL] - counts[TREATMENT]) <= 1 and max(counts.values()) <= blocks
    assert (experiment.state == "done") == (experiment.pairs == blocks)


@pytest.mark.parametrize(
    "bad", [{"block_seconds": 0.0}, {"block_seconds": float("nan")}, {"blocks": 0}, {"harm": -0.1}, {"harm": 1.1}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ConfigError):
        options(**bad)
