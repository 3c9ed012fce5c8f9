"""The guard: whatever a controller does, every decision is sound, in time, and the fallback's where it has to be."""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import (
    AUTOREGRESSIVE,
    Frontier,
    LoadView,
    PhaseTimes,
    Request,
    SamplingParams,
    SpecPlan,
    StepReport,
)
from echo_rl.controllers import make
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.policy.network import Policy
from echo_rl.controllers.policy.ppo import Ppo, PpoOptions
from echo_rl.controllers.selection import global_top_k, pack
from echo_rl.server.guard.guarded import ALL_METHODS, HANG_DEADLINES, MOST_FAULTS, Guarded, threaded_methods
from echo_rl.server.guard.lazy_observer import MOST_REPORTS, LazyObserver
from echo_rl.server.guard.validation import Limits, UnsoundDecision, check_plan, check_selection, clamp_plan
from tests import tiny
from tests.controllers.conftest import forest_of, load_of
from tests.controllers.policy.test_policy import random_policy
from tests.controllers.test_selection import forests

NAN = float("nan")
NO_HURRY = 60.0
"""A deadline that no machine misses, however busy."""
GOOD = SpecPlan(budget=4, max_depth=2, width=2, gates=((0, 0.5),))
FOREST = forest_of([(-1, 0.9), (-1, 0.1), (0, 0.8), (1, 0.05)], [(-1, 0.6), (-1, 0.3), (0, 0.5), (1, 0.2)])
FRONTIER = Frontier(0, torch.tensor([[-0.1, -2.0], [-1.0, -2.0]]), torch.tensor([True, True]))
LOAD = load_of(2)


class Scripted(BaseController):
    """Answers what it is told to: a value, an error to raise, or a function to call."""

    name = "scripted"

    def __init__(self, **answers) -> None:
        super().__init__()
        self.answers = answers
        self.observed = []

    def propose(self, load):
        raise AssertionError("plan() is overridden")

    def plan(self, load):
        self._node_cap = load.max_nodes
        return self._answer("plan", lambda: GOOD)

    def extend(self, frontier, plan):
        return self._answer("extend", lambda: super(Scripted, self).extend(frontier, plan))

    def select(self, forest, plan):
        return self._answer("select", lambda: super(Scripted, self).select(forest, plan))

    def observe(self, report):
        self.observed.append(report)
        self._answer("observe", lambda: None)

    def _answer(self, what, default):
        answer = self.answers.get(what, default)
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


class Other(Scripted):
    """The fallback of these tests: one node a request, stops everybody, recognisable."""

    name = "other"

    def plan(self, load):
        super().plan(load)
        return SpecPlan(budget=2, max_depth=1, width=1)

    def extend(self, frontier, plan):
        return torch.zeros_like(frontier.alive)

    def select(self, forest, plan):
        return pack(forest, global_top_k(forest, 1))


def report_of(load=LOAD, plan=GOOD) -> StepReport:
    return StepReport(load, plan, (), 4, 4, 1, 3, (2, 1), (1, 0), PhaseTimes(verify=0.02, draft=0.01))


def step(guard):
    """One step as the engine takes it."""
    plan = guard.plan(LOAD)
    mask = guard.extend(FRONTIER, plan)
    selection = guard.select(FOREST, plan)
    guard.observe(report_of(plan=plan))
    return plan, mask.tolist(), selection.size


def selected(**changes):
    return replace(pack(FOREST, global_top_k(FOREST, 4)), **changes)


OWN = (GOOD, [True, False], 4)
ALL_OTHER = (SpecPlan(budget=2, max_depth=1, width=1), [False, False], 1)


@pytest.mark.parametrize("threaded", [frozenset(), ALL_METHODS], ids=["inline", "threaded"])
def test_a_sound_controller_decides_everything(threaded):
    inner, other = Scripted(), Other()
    guard = Guarded(inner, other, deadline=5.0, threaded=threaded)
    assert step(guard) == OWN
    assert step(guard) == OWN
    guard.plan(LOAD)
    assert len(inner.observed) == len(other.observed) == 2, "both must see every step"
    assert not any(guard.fallbacks.values()) and guard.retired is None
    guard.close()


FAULTS = [
    ("plan", ValueError("no"), "exception"),
    ("plan", None, "invalid"),
    ("plan", SpecPlan(budget=2 * 64 + 1, max_depth=2), "invalid"),
    ("plan", SpecPlan(budget=1.5, max_depth=2), "invalid"),
    ("plan", SpecPlan(budget=NAN), "nan"),
    ("plan", SpecPlan(budget=4, max_depth=NAN), "nan"),
    ("plan", SpecPlan(budget=4, max_depth=2, gates=((0, NAN),)), "nan"),
    ("extend", RuntimeError("no"), "exception"),
    ("extend", torch.tensor([1, 0]), "invalid"),
    ("extend", torch.tensor([NAN, 0.5]), "nan"),
    ("extend", torch.tensor([True]), "invalid"),
    ("extend", [True, False], "invalid"),
    ("select", KeyError("no"), "exception"),
    ("select", (1, 2), "invalid"),
    ("select", lambda: pack(FOREST, global_top_k(FOREST, 5)), "invalid"),  # over the plan's budget
    ("select", lambda: selected(counts=torch.tensor([4, 1])), "invalid"),
    ("select", lambda: selected(counts=torch.tensor([5, -1])), "invalid"),
    ("select", lambda: selected(counts=torch.tensor([4])), "invalid"),
    ("select", lambda: selected(counts=torch.tensor([2.0, NAN])), "nan"),
    ("select", lambda: selected(counts=[2, 2]), "invalid"),
    ("select", lambda: selected(parents=torch.tensor([-1, -1, -1, -1])), "invalid"),  # depths tell otherwise
    ("select", lambda: selected(parents=torch.tensor([1, -1, -1, 0])), "invalid"),  # parent after its child
    ("select", lambda: selected(parents=torch.tensor([-2, 0, -1, -1])), "invalid"),
    ("select", lambda: selected(depths=torch.tensor([0, 2, 0, 0])), "invalid"),
    ("select", lambda: selected(tokens=torch.tensor([0, 1, 2, 10**6])), "invalid"),
    ("select", lambda: selected(tokens=torch.tensor([0, 1, 2, -1])), "invalid"),
    ("select", lambda: selected(tokens=torch.tensor([[0, 1, 2, 3]])), "invalid"),
]


@pytest.mark.parametrize("threaded", [frozenset(), ALL_METHODS], ids=["inline", "threaded"])
@pytest.mark.parametrize(("method", "answer", "cause"), FAULTS, ids=lambda value: str(value)[:30])
def test_the_fallback_takes_a_faulty_decision_over(method, answer, cause, threaded):
    guard = Guarded(Scripted(**{method: answer}), Other(), deadline=5.0, threaded=threaded)
    plan, mask, size = step(guard)
    if method == "plan":
        assert (plan, mask, size) == ALL_OTHER, "whoever plans a step finishes it"
    else:
        assert plan == GOOD
        assert mask == ([False, False] if method == "extend" else OWN[1])
        assert size == (1 if method == "select" else OWN[2])
    assert guard.fallbacks == {**dict.fromkeys(guard.fallbacks, 0), cause: 1}
    guard.close()


def test_the_selection_of_the_fault_cases_is_sound_as_such():
    assert selected().counts.tolist() == [2, 2], "the cases above were written for this one"
    check_selection(selected(), FOREST, GOOD, 64)
    with pytest.raises(UnsoundDecision, match="may have 0 to 1"):
        check_selection(selected(), FOREST, GOOD, 1)


@given(forests(), st.integers(0, 30), st.data())
@settings(max_examples=60)
def test_every_pick_of_a_rule_is_sound_and_no_damage_passes(forest, budget, data):
    selection = pack(forest, global_top_k(forest, budget))
    plan = SpecPlan(max(1, budget), 4, 4)
    check_selection(selection, forest, plan, max_nodes=30)
    if not selection.size:
        return
    at = data.draw(st.integers(0, selection.size - 1))
    depths = selection.depths.clone()
    depths[at] += data.draw(st.sampled_from([-1, 1]))
    with pytest.raises(UnsoundDecision):
        check_selection(replace(selection, depths=depths), forest, plan, max_nodes=30)
    parents = selection.parents.clone()
    parents[at] = data.draw(st.integers(at, at + 3))
    with pytest.raises(UnsoundDecision):
        check_selection(replace(selection, parents=parents), forest, plan, max_nodes=30)


@pytest.fixture
def held():
    """Ends what waits for it, at the latest with the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("method", ["plan", "extend", "select"])
def test_a_slow_decision_is_not_waited_for(method, held):
    guard = Guarded(Scripted(**{method: held.wait}), Other(), deadline=0.05, threaded=ALL_METHODS)
    began = time.monotonic()
    step(guard)
    assert time.monotonic() - began >= 0.05
    assert guard.fallbacks["deadline"] >= 1
    guard.close()


def test_a_controller_that_was_late_decides_again_when_it_is_back(held):
    inner = Scripted(plan=held.wait)
    guard = Guarded(inner, Other(), deadline=0.1, threaded=ALL_METHODS)
    assert step(guard) == ALL_OTHER
    assert step(guard) == ALL_OTHER, "still out: the fallback decides without waiting"
    assert guard.overdue
    guard._deadline = NO_HURRY
    del inner.answers["plan"]
    held.set()
    steps = 2
    while step(guard) != OWN:
        time.sleep(0.01)
        steps += 1
        assert steps < 1000
    assert guard.retired is None and len(inner.observed) == steps
    guard.close()


def test_a_hang_retires_the_controller_for_good(caplog, held):
    inner = Scripted(select=held.wait)
    guard = Guarded(inner, Other(), deadline=0.2, threaded=ALL_METHODS)
    step(guard)
    time.sleep(HANG_DEADLINES * 0.2)
    began = time.monotonic()
    for _ in range(50):
        assert step(guard) == ALL_OTHER
    assert time.monotonic() - began < 50 * 0.2, "nobody waits for it any more"
    assert "has not returned" in guard.retired
    assert guard.fallbacks["deadline"] > 50
    assert caplog.text.count("is retired") == 1


def test_a_slow_rule_of_this_package_is_counted_though_it_can_t_be_interrupted():
    guard = Guarded(Scripted(plan=lambda: time.sleep(0.03) or GOOD), Other(), deadline=0.01, threaded=frozenset())
    assert step(guard) == ALL_OTHER
    assert guard.fallbacks["deadline"] == 1


def test_faults_in_a_row_retire_and_a_clean_step_forgets_them(caplog):
    caplog.set_level(logging.WARNING)
    inner = Scripted(select=ValueError("no"))
    guard = Guarded(inner, Other(), deadline=5.0)
    for _ in range(MOST_FAULTS - 1):
        step(guard)
    del inner.answers["select"]
    step(guard)
    inner.answers["select"] = ValueError("no")
    for _ in range(MOST_FAULTS - 1):
        step(guard)
    assert guard.retired is None
    step(guard)
    assert "20 faults in a row" in guard.retired
    assert step(guard) == ALL_OTHER
    assert guard.fallbacks["exception"] == 2 * MOST_FAULTS, "19, 20 and the step of the retired one"
    assert caplog.text.count("select() raised") == 2, "once when it first happened, once as the reason"


def test_steps_that_only_prefill_forgive_nothing():
    guard = Guarded(Scripted(plan=ValueError("no")), Other(), NO_HURRY)
    for _ in range(MOST_FAULTS):
        step(guard)
        guard.observe(report_of())  # nobody decoded, no plan was asked for
    assert guard.retired is not None


def test_a_failing_observe_is_a_fault_of_the_controller_alone():
    inner, other = Scripted(observe=ValueError("no")), Other()
    guard = Guarded(inner, other, NO_HURRY, threaded=frozenset())
    assert step(guard) == OWN
    assert guard.fallbacks["exception"] == 1 and len(other.observed) == 1


def test_a_fallback_that_must_select_is_shown_the_load_first(make_profile):
    plan = SpecPlan(budget=2, max_depth=2, width=2)
    inner = Scripted(plan=plan, select=ValueError("no"))
    guard = Guarded(inner, make("echo", profile=make_profile()), NO_HURRY, threaded=frozenset())
    guard.plan(load_of(2, max_nodes=1))
    assert guard.select(FOREST, plan).counts.tolist() == [1, 1], (
        "the likeliest two are of one request, which may have one"
    )


def test_where_the_fallback_fails_too_nothing_is_speculated():
    class Broken(Other):
        def plan(self, load):
            raise ValueError("no")

        extend = select = observe = plan

    class Bad(Scripted):
        def extend(self, frontier, plan):
            raise ValueError("no")

        select = extend

    assert Guarded(Scripted(plan=None), Broken(), NO_HURRY).plan(LOAD) == AUTOREGRESSIVE
    plan, mask, size = step(Guarded(Bad(), Broken(), NO_HURRY, threaded=frozenset()))
    assert (plan, mask, size) == (GOOD, [True, True], 0)


def test_a_fallback_on_standby_is_shown_the_last_steps_before_it_decides():
    other = Other()
    standby = LazyObserver(other)
    for _ in range(MOST_REPORTS + 5):
        standby.observe(report_of())
    assert not other.observed
    standby.plan(LOAD)
    assert len(other.observed) == MOST_REPORTS


def test_without_a_drafter_nobody_is_asked():
    guard = Guarded(Scripted(plan=ValueError("asked")), Other(), limits=Limits(drafter=False))
    assert guard.plan(LOAD) == AUTOREGRESSIVE
    assert not any(guard.fallbacks.values())


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(1, 128))
def test_a_tree_is_cut_to_what_the_engine_can_draft(depth, width, nested, expanded):
    plan = SpecPlan(8, depth, width, nested=nested)
    limits = Limits(expanded)
    fits = clamp_plan(plan, limits)
    check_plan(fits, LOAD)
    assert fits.expanded <= expanded and fits.width <= expanded
    if plan.expanded <= expanded and width <= expanded:
        assert fits is plan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("repeat", [1, 4])
def test_a_policy_whose_numbers_fail_is_retired(repeat, make_profile):
    """Its weights are finite, or it would not have loaded; its logits overflow."""
    healthy = random_policy(repeat=repeat)
    huge = tuple(replace(layer, weight=layer.weight * np.float32(3e38)) for layer in healthy.layers)
    policy = Ppo(PpoOptions(Policy(huge, repeat=repeat), make_profile()))
    guard = Guarded(policy, make("echo"), deadline=5.0)
    for _ in range(MOST_FAULTS * repeat):
        guard.observe(report_of(plan=guard.plan(LOAD)))
        guard.observe(report_of())  # a step that only prefills
    assert guard.retired is not None and guard.fallbacks["nan"] >= MOST_FAULTS
    assert guard.plan(LOAD).budget <= 2 * 64


def test_only_what_is_learned_or_foreign_is_kept_aside(make_profile):
    assert threaded_methods(make("echo")) == threaded_methods(make("none")) == frozenset()
    assert threaded_methods(Ppo(PpoOptions(random_policy(), make_profile()))) == {"plan"}
    assert threaded_methods(Scripted()) == ALL_METHODS


class Saboteur(BaseController):
    """Decides at random, and mostly badly: every kind of fault that there is."""

    name = "saboteur"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)

    def propose(self, load: LoadView) -> SpecPlan:
        bad = [
            lambda: SpecPlan(10**9, 3, 2), lambda: SpecPlan(8, 60, 60), lambda: SpecPlan(8, NAN), lambda: None,
            lambda: SpecPlan(NAN), lambda: SpecPlan(8, 1, 10**6), lambda: SpecPlan(8, 2, 2, ((0, NAN),)), lambda: 1 / 0,
        ]  # fmt: skip
        good = [lambda: SpecPlan(self.rng.randint(1, 12), self.rng.randint(1, 4), self.rng.randint(1, 5), ((1, 0.3),))]
        return self.rng.choice(bad + 12 * good)()

    def plan(self, load: LoadView) -> SpecPlan:
        self._node_cap = load.max_nodes
        return self.propose(load)  # without the base's care

    def extend(self, frontier, plan):
        alive = frontier.alive
        return self.rng.choice([lambda: alive, lambda: alive[:0], lambda: alive * NAN, lambda: ~alive, lambda: 1 / 0])()

    def select(self, forest, plan):
        selection = super().select(forest, plan)
        noise = torch.randint(
            -2, 3, selection.parents.shape, generator=torch.Generator().manual_seed(self.rng.randrange(99))
        )
        ways = [
            lambda: replace(selection, parents=selection.parents + noise),
            lambda: replace(selection, depths=selection.depths + noise),
            lambda: replace(selection, tokens=selection.tokens + 10**7),
            lambda: replace(selection, counts=selection.counts + 1),
            lambda: pack(forest, forest.exists),
            lambda: 1 / 0,
        ]
        return self.rng.choice([*ways, *8 * [lambda: selection]])()


@pytest.fixture(scope="module")
def guarded_engine(tmp_path_factory):
    return tiny.engine(tmp_path_factory.mktemp("guarded"), prefill_chunk=16)


@pytest.mark.parametrize("seed", range(4))
def test_no_sabotage_breaks_a_step_or_changes_a_token(seed, guarded_engine, monkeypatch):
    monkeypatch.setattr("echo_rl.server.guard.guarded.MOST_FAULTS", 10**9)  # let it go on
    todo = [
        Request(f"r{i}", tuple(range(1 + i, 20 + i)), SamplingParams(0.7, seed=i, max_new_tokens=30, ignore_eos=True))
        for i in range(6)
    ]
    plain = _tokens(guarded_engine, make("none"), todo)
    limits = Limits(guarded_engine.config.max_expanded)
    guard = Guarded(Saboteur(seed), make("echo", nodes=3), NO_HURRY, limits, threaded=frozenset())
    assert _tokens(guarded_engine, guard, todo) == plain
    assert guarded_engine.block_manager.used_share == 0.0
    assert all(guard.fallbacks[cause] for cause in ("exception", "invalid")), "hardly anything went wrong"


def _tokens(engine, controller, todo):
    tokens = {request.id: [] for request in todo}
    for request in todo:
        engine.add(request)
    while engine.has_work:
        for output in engine.step(controller).outputs:
            tokens[output.id] += output.tokens
        engine.check_integrity()
    return tokens
