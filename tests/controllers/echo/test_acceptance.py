"""The yield model and the tree shapes behind it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from echo_rl.contracts import LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers.echo.acceptance import AcceptanceModel
from echo_rl.controllers.probing import ProbeBudget, PromptShare
from echo_rl.controllers.tree_shapes import affordable, likeliest_tree, pooled_yield, separate_yield


def report_of(accepted, batch=8, nodes=4, times=PhaseTimes(), depth=None):  # noqa: B008 - frozen
    plan = SpecPlan(nodes * batch, depth or len(accepted), 3) if nodes else SpecPlan(0)
    load = LoadView(batch, 0, 0, 128.0, 0.1, 64)
    total = sum(accepted)
    return StepReport(load, plan, (), 0, plan.budget, total, total + batch, accepted, accepted, times)


def expected(model, nodes, depth, width=10, batch=8):
    return float(model.expected(model.yields([(nodes, depth, width)], batch))[0])


def test_affordable_shapes_meet_the_published_ends():
    assert affordable(60.0) == affordable(500.0) == (8, 10)
    assert affordable(5.0) == (3, 3)
    assert affordable(0.25) == (3, 1) and affordable(1.0) == (3, 2)
    shapes = [affordable(n / 4) for n in range(1, 260)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(shapes))


def test_likeliest_tree_by_hand():
    # p = 0.6: .6, then .36 (0,0), .24 (1,), .216 (0,0,0)
    assert likeliest_tree(4, 3) == ((0,), (0, 0), (1,), (0, 0, 0))
    assert likeliest_tree(3, 1) == ((0,), (1,), (2,))


def test_yields_by_hand():
    easy, typical, hard = 0.9678, 0.6, 0.0695  # log-odds of 0.6 shifted by 3 either way
    assert sum(separate_yield(1.0, 1, 10, 0.6)) == pytest.approx((easy + typical + hard) / 3, abs=1e-4)
    assert pooled_yield(1.0, 3, 10, 0.6)[:3] == pytest.approx((easy / 3, easy**2 / 3, easy**3 / 3), abs=1e-4)
    assert pooled_yield(4 / 3, 3, 10, 0.6)[0] == pytest.approx((easy + typical) / 3, abs=1e-4)
    assert sum(pooled_yield(0.5, 1, 10, 0.6)) == pytest.approx((easy + typical / 2) / 3, abs=1e-4)
    two = sum(p + (1 - p) * p for p in (easy, typical, hard)) / 3
    assert sum(separate_yield(9.0, 1, 2, 0.6)) == pytest.approx(two, abs=1e-4)  # a third child is never drafted


@pytest.mark.parametrize(("depth", "width"), [(1, 13), (3, 4), (8, 10)])
def test_yields_grow_with_nodes_and_pooling_never_hurts(depth, width):
    sizes = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 12.0, 60.0]
    pooled = [sum(pooled_yield(n, depth, width, 0.6)) for n in sizes]
    assert all(a < b for a, b in pairwise(pooled))
    assert all(p >= sum(separate_yield(n, depth, width, 0.6)) - 1e-12 for n, p in zip(sizes, pooled, strict=True))


def test_the_estimate_follows_what_a_budget_yields():
    model = AcceptanceModel(horizon=64)
    for _ in range(100):
        model.observe(report_of((6, 4, 2)))  # of 8 requests
    assert expected(model, 4.0, 3) == pytest.approx(12 / 8, rel=0.05)
    assert expected(model, 8.0, 3) > expected(model, 4.0, 3) > expected(model, 1.0, 3)


def test_a_better_drafter_raises_every_estimate():
    good, bad = AcceptanceModel(), AcceptanceModel()
    for _ in range(100):
        good.observe(report_of((7, 6, 5)))
        bad.observe(report_of((2, 0, 0)))
    for nodes, depth in ((1.0, 1), (4.0, 3), (16.0, 5), (60.0, 8)):
        assert expected(good, nodes, depth) > expected(bad, nodes, depth)


def test_a_depth_that_fails_is_marked_down_alone():
    even, broken = AcceptanceModel(), AcceptanceModel()
    for _ in range(200):
        even.observe(report_of((6, 4, 3)))
        broken.observe(report_of((6, 6, 1)))
    gain_even = expected(even, 4.0, 3) - expected(even, 4.0, 2)
    gain_broken = expected(broken, 4.0, 3) - expected(broken, 4.0, 2)
    assert gain_broken < gain_even / 2


def test_plain_steps_teach_nothing_and_forget_nothing():
    model = AcceptanceModel()
    model.observe(report_of((6, 4, 2)))
    before = expected(model, 4.0, 3)
    for _ in range(50):
        model.observe(report_of((), nodes=0))
    assert expected(model, 4.0, 3) == before


def test_fewer_misses_would_yield_more():
    model = AcceptanceModel()
    yields = model.yields([(4.0, 3, 3), (1.0, 1, 2)], 8)
    assert (model.expected(yields, miss=0.5) > model.expected(yields)).all()
    assert (model.expected(yields, miss=1e-6) <= 8.0).all()


def test_a_probe_waits_for_its_credit_and_works_off_its_debt():
    budget = ProbeBudget(share=0.01, period=10)
    for _ in range(10):
        budget.plain(0.1)
    assert budget.affords(0.0099) and not budget.affords(0.02)
    budget.spent(0.11)  # far more than there was credit for
    steps = 0
    while not budget.affords(0.0):
        budget.plain(0.1)
        steps += 1
    assert steps == 100


def test_prompts_without_answers_do_not_price_drafting_out_for_good():
    share, answers = PromptShare(), report_of((8, 8))
    flood = replace(answers, load=replace(answers.load, prefill_tokens=10**7, batch_size=0), committed=0)
    share.observe(flood)
    assert share.ratio == PromptShare.MOST
    for _ in range(10_000 // answers.committed):
        share.observe(answers)
    assert share.ratio < 0.5
