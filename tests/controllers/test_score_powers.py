"""Tests which rules a backend may decide for, and that a server's guard passes it on only where it may."""

from __future__ import annotations

import pytest

from echo_rl.contracts import LoadView, SpecPlan
from echo_rl.controllers import make
from echo_rl.controllers.wrappers.base import ControllerWrapper
from echo_rl.controllers.wrappers.fitted import FittedController
from echo_rl.controllers.wrappers.timed import TimedController
from echo_rl.server.guard.guarded import Guarded
from tests import tiny
from tests.controllers.conftest import load_of
from tests.runtime.driving import requests, run

PLAN = SpecPlan(8, 3, 2)


@pytest.mark.parametrize("name", ["echo", "echo_dense", "echo_fixed", "ppo"])
def test_rules_that_select_as_echo_give_their_calibration(name):
    controller = make(name)
    assert controller.score_powers(PLAN) == controller.calibration.score_power


@pytest.mark.parametrize("name", ["echo_unscheduled", "ddd", "eagle2"])
def test_rules_with_gates_or_selection_of_their_own_must_be_asked(name):
    assert make(name).score_powers(PLAN) is None


def test_a_guard_passes_it_on_of_whoever_decides():
    class Broken(type(make("echo"))):
        def plan(self, load: LoadView) -> SpecPlan:
            raise RuntimeError("broken")

    echo = make("echo")
    guard = Guarded(echo, make("none"))
    guard.plan(load_of(2))
    assert guard.score_powers(PLAN) == echo.calibration.score_power
    for fallback in (make("eagle2"), echo):
        guard = Guarded(Broken.__new__(Broken), fallback, threaded=frozenset())
        guard.plan(load_of(2))
        assert guard.score_powers(PLAN) == fallback.score_powers(PLAN)
    foreign = Guarded(make("echo"), make("none"), threaded=frozenset({"plan", "extend", "select"}))
    assert foreign.score_powers(PLAN) is None


@pytest.mark.parametrize(
    "around",
    [
        lambda c: Guarded(c, make("none"), deadline=60.0),
        lambda c: FittedController(c, 8, 8),
        TimedController,
        ControllerWrapper,
    ],
)
def test_echo_is_served_on_the_device_whatever_is_around_it(tmp_path, around):
    engine = tiny.engine(tmp_path, step="device")
    todo = requests(6, 0.8)
    plain = run(engine, make("none"), todo)
    assert run(engine, around(make("echo")), todo) == plain
    assert not engine.serving.counts.eager


def test_a_controller_around_one_that_must_be_asked_must_be_asked():
    assert ControllerWrapper(make("ddd")).score_powers(PLAN) is None
    assert ControllerWrapper(Steps()).score_powers(PLAN) is None


class Steps:
    """A controller of somebody else's, which never heard of powers."""

    name = "steps"
