"""Corrections of a cost profile by what steps took."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.contracts import LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.costs.batched_correction import BatchedCorrectionCurve
from echo_rl.costs.correction import PRIOR, CorrectionCurve, CostCorrector, basis
from tests.profiles import hinge_profile


def report_of(verified, batch=8, times=PhaseTimes()):  # noqa: B008 - frozen
    plan = SpecPlan(verified, 3, 3) if verified else SpecPlan(0)
    load = LoadView(batch, 0, 0, 128.0, 0.1, 64)
    return StepReport(load, plan, (), 0, verified, 0, batch, (), (), times)


def test_drafting_the_rest_and_the_whole_machine_are_told_apart():
    profile = hinge_profile()
    corrector = CostCorrector(profile)
    slow = PhaseTimes(
        draft=3 * profile.draft_seconds(8, 3, 3),
        verify=2 * profile.verify_seconds(8, 8 + 24, 128.0),
        commit=1.5 * profile.overhead_seconds(8, 24, True),
    )
    for _ in range(400):
        corrector.observe(report_of(24, times=slow))
    assert corrector.draft == pytest.approx(3.0, rel=0.01)
    assert corrector.verify.factor(32) == pytest.approx(2.0, rel=0.01)
    assert corrector.verify.factor(8) == pytest.approx(2.0, rel=0.1)  # a slow machine is slow for everyone
    assert corrector.rest[False] == 1.0  # no plain step was seen
    assert corrector.rest[True] == pytest.approx(1.5, rel=0.01)


def test_drafting_that_catches_up_on_prompts_or_plain_steps_is_not_counted():
    profile = hinge_profile()
    corrector, drafting = CostCorrector(profile), profile.draft_seconds(8, 3, 3)
    prompt = replace(report_of(24), load=replace(report_of(24).load, prefill_tokens=64))
    prompts_alone = replace(prompt, load=replace(prompt.load, batch_size=0), plan=SpecPlan(0))
    for before in (prompt, prompts_alone, report_of(0)):
        corrector.observe(before)
        corrector.observe(report_of(24, times=PhaseTimes(draft=9 * drafting)))
        assert corrector.draft == 1.0
        corrector.observe(report_of(24, times=PhaseTimes(draft=drafting)))
        assert corrector.draft == pytest.approx(1.0)


def test_requests_that_refuse_speculation_are_rows_of_the_pass():
    profile = hinge_profile()
    corrector, report = CostCorrector(profile), report_of(24)
    times = PhaseTimes(verify=profile.verify_seconds(32, 32 + 24, 128.0))
    corrector.observe(replace(report, load=replace(report.load, plain=24), times=times))
    assert corrector.verify.factor(56) == pytest.approx(1.0)


def test_a_misjudged_plain_pass_is_learned_at_the_switch():
    """Speculative passes take twice the prediction, plain ones 1.4 times."""
    profile = hinge_profile()
    corrector = CostCorrector(profile)
    speculative = PhaseTimes(verify=2.0 * profile.verify_seconds(8, 40, 128.0))
    plain = PhaseTimes(verify=1.4 * profile.ar_seconds(8, 128.0))
    for _ in range(4):
        for _ in range(60):
            corrector.observe(report_of(32, times=speculative))
        corrector.observe(report_of(0, times=plain))
    assert corrector.verify.factor(40) == pytest.approx(2.0, rel=0.03)
    assert corrector.verify.factor(8) == pytest.approx(1.4, rel=0.05)
    for _ in range(200):  # off for good: the contrast stays, although plain steps alone cannot show it
        corrector.observe(report_of(0, times=plain))
    assert corrector.verify.factor(40) / corrector.verify.factor(8) == pytest.approx(2.0 / 1.4, rel=0.05)


def test_what_lies_between_two_measured_sizes_lies_between_their_factors():
    curve = CorrectionCurve()
    for _ in range(30):
        curve.follow(1, 1.2)
        curve.follow(16, 2.0)
    between = [curve.factor(rows) for rows in (1, 2, 3, 4, 6, 8, 12, 16)]
    assert between == sorted(between)
    assert 1.35 < curve.factor(4) < 1.75


def test_a_slow_spell_moves_the_whole_curve_and_keeps_its_shape():
    curve = CorrectionCurve()
    for _ in range(50):
        curve.follow(1, 1.0)
        curve.follow(16, 1.5)
    for _ in range(100):  # everything takes twice as long; only large passes are seen
        curve.follow(16, 3.0)
    assert curve.factor(16) == pytest.approx(3.0, rel=0.02)
    assert curve.factor(1) == pytest.approx(2.0, rel=0.1)


def test_one_preempted_pass_changes_little():
    curve = CorrectionCurve()
    for _ in range(200):
        curve.follow(8, 1.0)
    curve.follow(8, 50.0)
    assert curve.factor(8) < 1.1


def test_the_backlog_of_a_drafter_that_was_off_is_not_its_pace():
    corrector = CostCorrector(hinge_profile())
    corrector.observe(report_of(0, times=PhaseTimes(verify=0.01)))
    corrector.observe(report_of(8, times=PhaseTimes(draft=9.0, verify=0.01)))
    assert corrector.draft == 1.0


def test_steps_that_prefill_or_measure_nothing_teach_nothing():
    corrector = CostCorrector(hinge_profile())
    report = report_of(8, times=PhaseTimes(verify=5.0))
    corrector.observe(replace(report, load=replace(report.load, prefill_tokens=64)))
    for ratio in (0.0, -1.0, math.nan, math.inf):
        corrector.verify.follow(8, ratio)
    assert corrector.verify.factor(8) == 1.0


@given(st.lists(st.tuples(st.integers(1, 20_000), st.floats(1e-4, 1e4)), max_size=60))
def test_any_measurements_leave_a_finite_curve(measured):
    curve = CorrectionCurve()
    for rows, ratio in measured:
        curve.follow(rows, ratio)
    rows = [1, 1.5, 7, 64, 1000, 10**6]
    factors = curve.factors(basis(rows))
    assert np.isfinite(factors).all() and (factors > 0).all()
    assert factors == pytest.approx([curve.factor(n) for n in rows])
    assert np.linalg.eigvalsh(curve._covariance).min() > -1e-9
    assert (np.diag(curve._covariance) <= np.diag(PRIOR) + 1e-9).all()


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10.0), st.booleans()), min_size=1, max_size=40))
def test_the_curves_of_lanes_are_as_many_curves(measured):
    """Each lane learns from its own passes alone, also beside a lane that saw nothing or another size."""
    single, many = CorrectionCurve(), BatchedCorrectionCurve(3)
    for rows, ratio, counts in measured:
        if counts:
            single.follow(rows, ratio)
        many.follow(np.array([rows, 300 - rows, 1.0]), np.array([ratio, 1.0, ratio]), np.array([counts, True, False]))
    asked = np.array([1.0, 3.0, 20.0, 500.0])
    factors = many.factors(np.tile(asked, (3, 1)))
    np.testing.assert_allclose(factors[0], single.factors(basis(asked)), rtol=1e-9)
    assert (factors[2] == 1.0).all()
    many.reset(np.array([True, False, False]))
    assert (many.factors(asked[:3])[0] == 1.0).all()


def test_what_a_busy_neighbour_costs_is_forgotten_once_it_is_gone():
    """Large passes lose more beside one: that is not a property of large passes."""
    profile = hinge_profile()
    corrector = CostCorrector(profile)

    def observe(verified: int, factor: float, contended: bool) -> None:
        seconds = factor * profile.verify_seconds(8, 8 + verified, 128.0)
        report = report_of(verified, times=PhaseTimes(verify=seconds))
        corrector.observe(replace(report, contended=contended))

    for _ in range(200):
        observe(0, 1.1, contended=False)
        observe(56, 1.1, contended=False)
    before = corrector.verify.factor(64)
    observe(56, 3.0, contended=True)
    assert corrector.verify.factor(64) > before  # from the idle machine's on
    for _ in range(200):
        observe(0, 1.3, contended=True)
        observe(56, 3.0, contended=True)
    assert corrector.verify.factor(64) == pytest.approx(3.0, rel=0.05)
    assert corrector.verify.factor(8) == pytest.approx(1.3, rel=0.05)
    observe(0, 1.1, contended=False)
    assert corrector.verify.factor(64) == pytest.approx(before, rel=0.01)
    observe(0, 1.3, contended=True)
    assert corrector.verify.factor(64) == pytest.approx(3.0, rel=0.05)  # nor is it learnt anew
