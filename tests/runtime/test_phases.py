"""The two phases of a live step: equal to the step, whatever comes and goes or fails between them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, LoadView, Request, SamplingParams, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.selection import pack
from echo_rl.errors import ConfigError, PlanViolation
from echo_rl.runtime import engine as engine_module
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.step.base import Clock
from tests import tiny
from tests.runtime.driving import requests, run

PLANS = (AUTOREGRESSIVE, SpecPlan(6, 3, 2), SpecPlan(4, 4, 1), SpecPlan(20, 3, 3, ((0, 0.05), (1, 0.02))))


class Plans(BaseController):
    """One of `PLANS` after the other, by the default rules."""

    name = "plans"

    def __init__(self) -> None:
        super().__init__()
        self.reports = []
        self.planned = []

    def propose(self, load: LoadView) -> SpecPlan:
        self.planned.append(load)
        return PLANS[len(self.planned) % len(PLANS)]

    def observe(self, report) -> None:
        self.reports.append(report)


class Phased:
    """An engine whose steps are taken phase by phase."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def step(self, controller):
        load = self.engine.prepare()
        return self.engine.execute(controller.plan(load) if load.batch_size else PLANS[1], controller)


@pytest.fixture(scope="module", params=["eager", "device"])
def engine(tmp_path_factory, request) -> Engine:
    return tiny.engine(tmp_path_factory.mktemp(request.param), prefill_chunk=16, step=request.param, max_batch_size=4)


def cancel_all(engine: Engine) -> None:
    for name in list(engine._sequences):
        engine.cancel(name)
    engine.check_integrity()


@pytest.fixture(autouse=True)
def idle(engine):
    yield
    cancel_all(engine)
    assert engine.block_manager.used_share == 0.0 and not engine.has_work


def started(engine: Engine, count: int) -> list[Request]:
    """So many requests, all of which decode."""
    todo = requests(count)
    for request in todo:
        engine.add(request)
    while engine.prepare().batch_size < count:
        engine.execute(AUTOREGRESSIVE, Plans())
    return todo


def finish(engine: Engine, found: dict[str, list[int]]) -> dict[str, list[int]]:
    controller = Plans()
    while engine.has_work:
        for output in engine.step(controller).outputs:
            found.setdefault(output.id, []).extend(output.tokens)
        engine.check_integrity()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_phases_are_the_step(engine, temperature):
    todo = [replace(r, speculate=i % 4 < 3) for i, r in enumerate(requests(8, temperature))]
    whole, phased = Plans(), Plans()
    assert run(engine, whole, todo) == run(Phased(engine), phased, todo)
    assert phased.planned == whole.planned
    assert [replace(r, times=None) for r in phased.reports] == [replace(r, times=None) for r in whole.reports]
    assert sum(r.accepted for r in whole.reports) > 0 and any(not r.load.batch_size for r in whole.reports)


def test_preparing_again_changes_nothing(engine):
    for request in requests(6):
        engine.add(request)
    load = engine.prepare()
    assert (load.batch_size, load.waiting, load.arrived) == (0, 2, 6)
    assert engine.prepare() is load
    engine.check_integrity()
    assert engine.execute(AUTOREGRESSIVE, Plans()).load is load
    assert engine.prepare() != load and engine.prepare().arrived == 0


def test_nobody_is_asked_for_a_plan_where_nobody_may_speculate(engine):
    controller = Plans()
    engine.add(requests(1)[0])
    assert engine.prepare().batch_size == 0
    report = engine.execute(SpecPlan(8, 3, 2), controller)
    assert report.plan == AUTOREGRESSIVE and not report.drafted
    assert not controller.planned and controller.reports == [report]


def test_a_request_that_is_added_waits_for_the_next_step(engine):
    started(engine, 2)
    load = engine.prepare()
    engine.add(Request("late", (70, 71), SamplingParams(max_new_tokens=4)))
    assert engine.prepare() is load
    report = engine.execute(PLANS[1], Plans())
    assert report.load is load and {o.id for o in report.outputs} == {"r0", "r1"}
    after = engine.prepare()
    assert (after.batch_size, after.prefill_tokens, after.arrived) == (2, 2, 1)


def test_a_cancelled_request_takes_the_prepared_step_apart(engine):
    todo = requests(3)
    plain = run(engine, Plans(), todo)
    started(engine, 3)
    waiting = Request("waiting", (70,) * 20, SamplingParams(max_new_tokens=4))
    engine.add(waiting)
    assert engine.prepare().batch_size == 3
    engine.cancel("r1")
    engine.check_integrity()
    report = engine.execute(PLANS[3], Plans())
    assert (report.load.batch_size, report.load.prefill_tokens) == (2, 16) and report.plan is PLANS[3]
    engine.check_integrity()
    found = finish(engine, {})
    assert all(found[name] == plain[name][-len(found[name]) :] for name in ("r0", "r2"))
    assert set(found) == {"r0", "r2", "waiting"}


def test_cancelling_and_adding_schedules_prompts_anew(engine):
    """A chunk that was scheduled twice is processed once."""
    long = Request("long", tuple(range(65, 65 + 24)), SamplingParams(max_new_tokens=5))
    alone = run(engine, Plans(), [long])
    for request in (requests(1)[0], long, Request("gone", (80,) * 9, SamplingParams(max_new_tokens=5))):
        engine.add(request)
    found: dict[str, list[int]] = {}
    for name in ("gone", "r0"):
        engine.prepare()
        engine.cancel(name)
        report = engine.execute(AUTOREGRESSIVE, Plans())
        assert report.load.prefill_tokens <= 16
        for output in report.outputs:
            found.setdefault(output.id, []).extend(output.tokens)
    assert finish(engine, found)["long"] == alone["long"]


def test_a_step_whose_requests_are_all_cancelled_is_none(engine):
    started(engine, 2)
    engine.prepare()
    engine.cancel("r0")
    engine.cancel("r1")
    for phase in (engine.prepare, lambda: engine.execute(PLANS[1], Plans()), lambda: engine.step(Plans())):
        with pytest.raises(ConfigError, match="no request"):
            phase()


def test_requests_that_came_and_went_between_steps_have_not_arrived(engine):
    started(engine, 1)
    engine.execute(AUTOREGRESSIVE, Plans())
    for name in ("a", "b"):
        engine.add(Request(name, (70,), SamplingParams(max_new_tokens=4)))
    assert engine.prepare().arrived == 2
    engine.cancel("a")
    assert engine.prepare().arrived == 1


def test_a_step_may_be_executed_unprepared(engine):
    started(engine, 2)
    engine.execute(PLANS[1], Plans())
    report = engine.execute(PLANS[1], Plans())
    assert report.load.batch_size == 2 and report.verified > 0


class Failing(Plans):
    """Raises an error in one of its methods, once."""

    def __init__(self, where: str, error: type[BaseException]) -> None:
        super().__init__()
        self.where, self.error = where, error

    def fail(self, where: str) -> None:
        if where == self.where:
            self.where = ""
            raise self.error(where)

    def propose(self, load):
        self.fail("propose")
        return PLANS[3]

    def extend(self, frontier, plan):
        self.fail("extend")
        return super().extend(frontier, plan)

    def select(self, forest, plan):
        self.fail("select")
        return super().select(forest, plan)

    def score_powers(self, plan):
        return None  # asked level by level


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["propose", "extend", "select"])
def test_what_a_controller_raises_leaves_the_engine_usable(engine, where, error):
    todo = requests(3)
    plain = run(engine, Plans(), todo)
    for request in todo:
        engine.add(request)
    found = {r.id: [] for r in todo}
    controller = Failing(where, error)
    failed = 0
    while engine.has_work:
        try:
            outputs = engine.step(controller).outputs
        except error:
            outputs, failed = (), failed + 1
        engine.check_integrity()
        for output in outputs:
            found[output.id] += output.tokens
    assert failed == 1 and found == plain


def test_an_interrupt_in_the_models_pass_leaves_the_engine_usable(engine, monkeypatch):
    todo = requests(3)
    plain = run(engine, Plans(), todo)
    started(engine, 3)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.target, "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.execute(PLANS[1], Plans())
    engine.check_integrity()
    found = finish(engine, {})
    assert all(tokens == plain[name][-len(tokens) :] for name, tokens in found.items())


def test_a_plan_that_is_refused_can_be_followed_by_another(engine):
    class Greedy(Plans):
        def select(self, forest, plan):
            return pack(forest, forest.exists)

        def score_powers(self, plan):
            return None

    started(engine, 2)
    load = engine.prepare()
    with pytest.raises(PlanViolation, match="selected"):
        engine.execute(SpecPlan(2, 2, 4), Greedy())
    with pytest.raises(PlanViolation, match="max_expanded"):
        engine.execute(SpecPlan(200, 50, 8), Plans())
    engine.check_integrity()
    assert engine.prepare() == replace(load, kv_used=engine.prepare().kv_used)
    assert engine.execute(PLANS[1], Plans()).committed >= 2


def test_time_between_the_phases_is_nobodys_and_planning_is_the_steps(engine, monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    class Slow(Plans):
        def propose(self, load):
            now[0] += 1000.0
            return AUTOREGRESSIVE

    monkeypatch.setattr(engine_module, "Clock", lambda: Clock(tick))
    started(engine, 2)
    engine.prepare()
    now[0] += 1000.0
    phased = engine.execute(AUTOREGRESSIVE, Plans()).times
    assert phased.total < 100.0 and phased.schedule > 0.0
    engine.prepare()
    now[0] += 500.0
    planned = engine.step(Slow()).times
    assert 1000.0 <= planned.plan < 1100.0 and planned.total - planned.plan < 100.0


@pytest.fixture(scope="module")
def pool(engine) -> tuple[list[Request], dict[str, list[int]]]:
    """Requests, some of which never speculate, and their tokens."""
    rng = random.Random(3)
    chosen = [replace(r, speculate=rng.random() < 0.8) for r in requests(6, 0.8, tokens=9)]
    return chosen, run(engine, Plans(), chosen)


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("prepare"), st.just(0)),
    st.tuples(st.sampled_from(("execute", "execute", "step")), st.integers(0, len(PLANS) - 1)),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=40))
def test_any_order_of_adding_cancelling_and_phases_conserves_memory_and_tokens(engine, pool, actions):
    chosen, expected = pool
    live: dict[str, list[int]] = {}
    load = None
    cancel_all(engine)  # an example that failed
    for number, (action, index) in enumerate([*actions, *[("step", 1)] * 60]):
        if action == "add":
            request = replace(chosen[index], id=f"{chosen[index].id}#{number}")
            engine.add(request)
            live[request.id] = []
        elif action == "cancel" and live:
            name = list(live)[index % len(live)]
            engine.cancel(name)
            del live[name]
            load = None
        elif engine.has_work and action == "prepare":
            again = engine.prepare()
            assert load in (None, again)
            load = again
        elif engine.has_work and action in ("execute", "step"):
            report = engine.execute(PLANS[index], Plans()) if action == "execute" else engine.step(Plans())
            assert load in (None, report.load) and report.verified <= report.plan.budget
            load = None
            for output in report.outputs:
                live[output.id] += output.tokens
                whole = expected[output.id.partition("#")[0]]
                assert live[output.id] == whole[: len(live[output.id])]
                if output.finish_reason:
                    assert live.pop(output.id) == whole
        assert set(engine._sequences) == set(live)
        engine.check_integrity()
    assert not live and not engine.has_work and engine.block_manager.used_share == 0.0
