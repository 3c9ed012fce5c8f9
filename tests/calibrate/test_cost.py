"""Measuring a known machine gives back its surface."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from echo_rl.calibrate.cost import Grid, Machine, isotonic, measure
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

MACHINE = Machine("cpu", "float32", "fake", 1)
GRID = Grid(batches=(1, 4), rows=(1, 2, 4, 8, 16, 32), contexts=(64, 256), widths=(1, 4), depths=(1, 4), repeats=5)


class FakeMachine:
    """10 ms flat to 8 rows, then 1 ms a row; 2 ms a level; multiplicative noise; may fail after some calls."""

    def __init__(self, noise=0.0, fails_after=None):
        self.noise, self.left, self.calls, self.rng = noise, fails_after, [], random.Random(1)

    def verify(self, batch, rows, context):
        return self._took(("verify", batch, rows, context), 0.01 + 1e-3 * max(0, rows - 8) + 1e-6 * context)

    def draft(self, batch, width, depth, context):
        assert context == GRID.draft_context
        return self._took(("draft", batch, width, depth), 2e-3 * depth)

    def _took(self, point, seconds):
        if self.left is not None and len(self.calls) >= self.left:
            raise KeyboardInterrupt
        self.calls.append(point)
        return seconds * self.rng.lognormvariate(0.0, self.noise)


def measured(machine, **options):
    return measure(machine.verify, machine.draft, MACHINE, GRID, **options)


def test_a_quiet_machine_is_recovered_exactly():
    profile = measured(FakeMachine(), provenance="fake")
    assert profile.verify_seconds(1, 16, 64) == pytest.approx(0.018 + 64e-6)
    assert profile.draft_seconds(4, 4, 4) == pytest.approx(8e-3)
    assert profile.noise == pytest.approx(0.0, abs=1e-9)
    assert profile.hinge(1, 64).k_max == 7
    assert (profile.model, profile.provenance) == ("fake", "fake")


def test_noise_is_averaged_out_and_reported():
    profile = measured(FakeMachine(noise=0.1))
    assert profile.verify_seconds(1, 16, 64) == pytest.approx(0.018, rel=0.2)
    assert 0.06 < profile.noise < 0.14


def test_every_point_is_timed_equally_often_and_interleaved():
    machine = FakeMachine()
    measured(machine)
    points = GRID.points()
    assert sorted(machine.calls) == sorted(points * GRID.repeats)
    for r in range(GRID.repeats):
        assert set(machine.calls[r * len(points) : (r + 1) * len(points)]) == set(points)


def test_plain_decoding_is_always_on_the_grid():
    assert Grid(batches=(1, 6), rows=(1, 8)).verify_rows == (1, 6, 8)


def test_an_interrupted_measurement_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_rl.calibrate.cost.SAVE_EVERY", -1.0)
    samples = tmp_path / "samples.json"
    first = FakeMachine(fails_after=40)
    with pytest.raises(KeyboardInterrupt):
        measured(first, samples=samples)
    second = FakeMachine()
    profile = measured(second, samples=samples)
    assert sorted(first.calls + second.calls) == sorted(GRID.points() * GRID.repeats)
    third = FakeMachine()
    assert measured(third, samples=samples) == profile and not third.calls
    profile.save(tmp_path / "profile.json")
    assert CostProfile.load(tmp_path / "profile.json") == profile


def test_samples_of_another_machine_are_refused(tmp_path):
    samples = tmp_path / "samples.json"
    measured(FakeMachine(), samples=samples)
    with pytest.raises(ConfigError, match="another device; delete it to measure anew"):
        measure(FakeMachine().verify, FakeMachine().draft, Machine("cuda", "float32", "fake", 1), GRID, samples)
    with pytest.raises(ConfigError, match="another widths"):
        measure(FakeMachine().verify, FakeMachine().draft, MACHINE, replace(GRID, widths=(1, 5)), samples)


def test_samples_of_another_drafter_are_refused(tmp_path):
    samples = tmp_path / "samples.json"
    measured(FakeMachine(), samples=samples, environment={"drafter": "a", "cpu": "fast"})
    measured(FakeMachine(), samples=samples, environment={"drafter": "a", "cpu": "fast"})
    for environment in ({"drafter": "b", "cpu": "fast"}, {"cpu": "fast"}, {}):
        with pytest.raises(ConfigError, match="another drafter|another environment"):
            measured(FakeMachine(), samples=samples, environment=environment)


def test_a_timer_that_returns_no_time_is_refused():
    with pytest.raises(ConfigError, match="a timer must return a time"):
        measure(lambda *_: 0.0, FakeMachine().draft, MACHINE, GRID)


def test_isotonic_by_hand():
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert isotonic([2.0, 1.0], [3.0, 1.0]) == [1.75, 1.75]
