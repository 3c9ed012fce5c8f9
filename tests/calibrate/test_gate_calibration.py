"""Calibrating gates: each statistic by hand, then the whole on drafters whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echo_rl.calibrate.gates import (
    GateObservation,
    GateOptions,
    auc,
    auc_interval,
    best_paths,
    best_tau,
    calibrate,
    score_power,
    wilson,
)
from echo_rl.contracts import Forest
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.errors import ConfigError


def arrays(right, wrong):
    return np.array([*right, *wrong]), np.array([True] * len(right) + [False] * len(wrong))


def drafted(depth, power, n=3000, seed=0):
    """Observations whose acceptance probability is ``confidence ** power``; power None: independent of it."""
    rng = np.random.default_rng(seed + depth)
    for confidence in rng.uniform(0.0, 1.0, n):
        chance = 0.5 if power is None else confidence**power
        yield GateObservation(depth, float(confidence), bool(rng.random() < chance))


def test_auc_by_hand():
    assert auc(*arrays([0.9, 0.8], [0.1, 0.2])) == 1.0
    assert auc(*arrays([0.1], [0.9])) == 0.0
    assert auc(*arrays([0.5], [0.5])) == 0.5
    assert auc(*arrays([0.9, 0.4], [0.5, 0.4])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_auc_equals_all_pairs_on_random_ties():
    rng = np.random.default_rng(0)
    confidence, accepted = rng.integers(0, 6, 80) / 5, rng.random(80) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[accepted] for b in confidence[~accepted]]
    assert auc(confidence, accepted) == pytest.approx(np.mean(pairs))


def test_auc_interval_covers_the_truth():
    observations = list(drafted(0, 1.0))
    rate = auc_interval(*arrays_of(observations), GateOptions())
    assert rate.low < rate.value < rate.high < rate.low + 0.06
    assert rate.low < 5 / 6 < rate.high  # of a calibrated uniform confidence


def arrays_of(observations):
    return np.array([o.confidence for o in observations]), np.array([o.accepted for o in observations])


def test_wilson_by_hand():
    rate = wilson(2, 10)
    assert rate.value == 0.2
    assert (rate.low, rate.high) == pytest.approx((0.0567, 0.5098), abs=1e-3)
    assert wilson(0, 10).low == 0.0 and 0.25 < wilson(0, 10).high < 0.3


def test_best_tau_by_hand():
    # benefits at price 0.5, most confident first: +.5, +1, +.5, +1, +.5
    assert best_tau(np.array([0.9, 0.8, 0.6, 0.5, 0.1]), np.array([1, 1, 0, 1, 0], bool), 0.5) == pytest.approx(0.7)
    assert best_tau(np.array([0.9, 0.1]), np.array([1, 1], bool), 0.5) == 0.0
    assert best_tau(np.array([0.9, 0.1]), np.array([0, 0], bool), 0.5) == 1.0
    # equal confidences cannot be told apart, whatever their order
    assert best_tau(np.array([0.5, 0.5, 0.5]), np.array([1, 0, 0], bool), 0.5) == 1.0


def test_best_tau_of_a_calibrated_drafter_is_the_price():
    assert best_tau(*arrays_of(list(drafted(0, 1.0, n=20000))), 0.3) == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_score_power_is_recovered(power):
    assert score_power(*arrays_of(list(drafted(0, power)))) == pytest.approx(power, rel=0.1)


def test_calibrate_picks_an_informative_depth_of_each_third(tmp_path):
    powers = {0: None, 1: 1.0, 2: None, 3: None, 4: 1.0, 5: 1.5}
    observations = [o for depth, power in powers.items() for o in drafted(depth, power)]
    calibration = calibrate(observations, GateOptions(resamples=50), "simulated")
    assert calibration.chosen[0] == 1 and calibration.chosen[-1] in (4, 5)
    assert len(calibration.score_power) == 6 and calibration.score_power[5] == pytest.approx(1.5, rel=0.15)
    gate = calibration.depths[1]
    assert gate.samples == 3000 and gate.tau == pytest.approx(0.2, abs=0.1)
    confidence, accepted = arrays_of([o for o in observations if o.depth == 1])
    assert gate.false_truncation.value == pytest.approx(np.mean(confidence[accepted] < gate.tau))
    assert gate.false_extension.value == pytest.approx(np.mean(confidence[~accepted] >= gate.tau))
    calibration.save(tmp_path / "gates.json")
    assert GateCalibration.load(tmp_path / "gates.json") == calibration


def test_too_few_observations_are_refused():
    with pytest.raises(ConfigError, match="observe more steps"):
        calibrate(drafted(0, 1.0, n=10), GateOptions())


@pytest.mark.parametrize("options", [{"price": 0.0}, {"least": 0}, {"resamples": 1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        GateOptions(**options)


def test_best_paths_against_the_targets_tokens():
    """Best paths: [5] then [5, 8] then [5, 8, 9]; the second request stopped after its first level."""
    gap = float("-inf")
    forest = Forest(
        tokens=torch.tensor([[5, 6, 8, 7, 9], [5, 6, 0, 0, 0]]),
        parents=torch.tensor([[-1, -1, 0, 1, 2]] * 2),
        depths=torch.tensor([0, 0, 1, 1, 2]),
        scores=torch.tensor([[0.6, 0.3, 0.5, 0.1, 0.4], [0.2, 0.7, 0.0, 0.0, 0.0]]).log(),
        stop_depth=torch.tensor([2, 0]),
    )
    assert forest.scores[1, 2] == gap

    def judged(*tokens):
        return [(o.depth, round(o.confidence, 2), o.accepted) for o in best_paths(forest, tokens)]

    assert judged([5, 8, 9, 1], [6, 2]) == [(0, 0.6, True), (1, 0.5, True), (2, 0.4, True), (0, 0.7, True)]
    assert judged([5, 7], [5]) == [(0, 0.6, True), (1, 0.5, False), (2, 0.4, False), (0, 0.7, False)]
    assert judged([5, 8], [6]) == [(0, 0.6, True), (1, 0.5, True), (0, 0.7, True)]  # nothing is known below 8
