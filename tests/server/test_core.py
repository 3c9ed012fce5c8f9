"""The engine's loop and its controllers: swaps, roll-backs, experiments and faults, without any transport."""

from __future__ import annotations

import time
from collections import Counter
from itertools import count, cycle
from types import SimpleNamespace

import pytest

from echo_rl.contracts import AUTOREGRESSIVE, Request, SamplingParams, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, IntegrityError, PlanViolation
from echo_rl.server.config import ControllerManagerOptions, ExperimentOptions
from echo_rl.server.core import engine_core
from echo_rl.server.core.engine_core import CoreOptions, EngineCore
from echo_rl.server.core.worker import build_controller
from echo_rl.server.guard.validation import Limits
from echo_rl.server.messages import (
    Cancel,
    ExperimentReport,
    Inspect,
    Refused,
    Reply,
    SetController,
    StartExperiment,
    Stepped,
    Stop,
    StopExperiment,
    Submit,
    TraceTrees,
)
from echo_rl.workloads.driver import serve
from tests import tiny
from tests.server.engine_clients import ServedFake, request_of


class Director:
    """Plays the engine client: hands out commands, takes events. A scene is a generator that yields lists of commands,
    one before every step; it is resumed as long as there is work, and its end stops the core."""

    def __init__(self, scene=None) -> None:
        self.events = []
        self.waits = []
        self._scene = scene

    def receive(self, timeout):
        self.waits.append(timeout)
        if timeout:
            time.sleep(timeout)
        return next(self._scene, [Stop()])

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def stats(self):
        return [event.stats for event in self.of(Stepped)]

    @property
    def tokens(self):
        tokens = {}
        for event in self.of(Stepped):
            for output in event.outputs:
                tokens.setdefault(output.id, []).extend(output.tokens)
        return tokens

    def reply(self, ticket):
        return next((event for event in self.of(Reply) if event.ticket == ticket), None)

    def until_reply(self, ticket):
        """Lets steps pass until a command is answered."""
        while self.reply(ticket) is None:
            yield []


def play(scene, engine=None, make=build_controller, spec="none", **options) -> Director:
    """Runs a core through a scene (a function of the director); returns what it said."""
    director = Director()
    director._scene = scene(director)
    switch = ControllerManagerOptions(**{"fallback": "none", **options.pop("switch", {})})
    core = EngineCore(engine or ServedFake(0.0), make, spec, CoreOptions(switch=switch, **options))
    core.run(director.receive, director.events.append)
    return director


def long_request(name="long", tokens=10**6):
    return Submit(request_of("abc", name, max_new_tokens=tokens))


def quiet(steps):
    return ([] for _ in range(steps))


class Bad(BaseController):
    """Sound in a dry run, whose contexts are long, and bad in these tests' steps."""

    name = "bad"

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def propose(self, load):
        return AUTOREGRESSIVE if load.mean_context > 200 else self.how()


def make_with_bad(how):
    return lambda spec: Bad(how) if spec == "bad" else build_controller(spec)


def fail():
    raise ValueError("no")


# ----------------------------------------------------------------------------- requests


def test_requests_are_served_and_the_core_sleeps_without_work():
    def scene(director):
        yield [Submit(request_of("abc", "a", max_new_tokens=3)), Submit(request_of("xy", "b", max_new_tokens=2))]
        yield from quiet(3)

    director = play(scene)
    assert director.tokens == {"a": [100, 101, 102], "b": [99, 100]}
    assert director.waits == [None, 0.0, 0.0, None, None]
    assert [stats.running for stats in director.stats] == [2, 2, 1]
    assert [stats.batch for stats in director.stats] == [0, 2, 1]


def test_what_the_engine_cannot_take_is_refused_and_nobody_else_suffers():
    class Picky(ServedFake):
        def add(self, request):
            if request.id == "odd":
                raise TypeError("what is this?")
            super().add(request)

    def scene(director):
        yield [long_request("a", 5), long_request("a", 5), Submit(request_of("!", "bad")), long_request("odd")]
        yield from quiet(6)

    director = play(scene, Picky(0.0))
    assert {(event.request_id, event.message[:20]) for event in director.of(Refused)} == {
        ("a", "request id 'a' is in"),
        ("bad", "the prompt holds '!'"),
        ("odd", "the engine cannot ta"),
    }
    assert [event.request_id for event in director.of(Refused) if event.unforeseen] == ["odd"]
    assert not any("TypeError" in event.message for event in director.of(Refused))
    assert len(director.tokens["a"]) == 5


def test_cancelled_requests_leave_and_unknown_ones_are_ignored():
    engine = ServedFake(0.0)

    def scene(director):
        yield [long_request("a"), long_request("b", 4)]
        yield [Cancel("a"), Cancel("nobody")]
        yield from quiet(4)
        yield [Cancel("b"), Inspect(1)]

    director = play(scene, engine)
    assert director.tokens == {"a": [100], "b": [100, 101, 102, 103]}
    assert engine.cancelled == ["a"]
    assert director.reply(1).value["in_flight"] == 0


def test_an_engine_that_lost_blocks_still_tells_what_it_holds():
    class Leaky(ServedFake):
        def check_integrity(self):
            raise IntegrityError("3 blocks are lost")

    director = play(lambda director: iter([[long_request(), Inspect(1)]]), Leaky(0.0))
    reply = director.reply(1)
    assert reply.error is None and reply.value["kv"] == "3 blocks are lost" and reply.value["in_flight"] == 1


def test_stop_cancels_what_is_in_flight():
    engine = ServedFake(0.0)
    play(lambda director: iter([[long_request("a")], []]), engine)
    assert not engine.live and engine.cancelled == ["a"]


def test_an_engine_that_raises_ends_the_core():
    with pytest.raises(ZeroDivisionError):
        play(lambda director: iter([[Submit(request_of("#", "poison"))], []]))


# ----------------------------------------------------------------------------- swaps

SPECS = ("echo:nodes=2", "none", "chain:steps=3", "ppo", "eagle3", "echo_dense:nodes=5", "static", "bandit")
BROKEN = ("oracle", "echo:nodes=-1", "nonsense", "ppo:path=/nowhere", "")


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory):
    return tiny.engine(tmp_path_factory.mktemp("core"), prefill_chunk=16)


def prompt_of(number):
    params = SamplingParams(0.8 * (number % 2), seed=number, max_new_tokens=20 + number % 17, ignore_eos=True)
    return Request(f"r{number}", tuple(range(1 + number % 50, 12 + number % 50)), params, speculate=number % 5 != 0)


def test_twenty_swaps_in_flight_change_no_token_and_lose_no_block(tiny_engine):
    """Requests come and go all the while, some are cancelled, and every third swap is refused."""
    sent, cancelled, swapped = [], set(), []

    def traffic(director):
        """Keeps six requests in flight."""
        done = {o.id for event in director.of(Stepped)[-1:] for o in event.outputs if o.finish_reason}
        in_flight.difference_update(done)
        commands = []
        if len(sent) % 7 == 6 and in_flight:
            cancelled.add(gone := in_flight.pop())
            commands.append(Cancel(gone))
        while len(in_flight) < 6:
            sent.append(request := prompt_of(len(sent)))
            in_flight.add(request.id)
            commands.append(Submit(request))
        return commands

    def scene(director):
        specs, broken = cycle(SPECS), cycle(BROKEN)
        for ticket in range(1, 31):
            spec = next(broken) if ticket % 3 == 0 else next(specs)
            yield [*traffic(director), SetController(2 * ticket, spec), Inspect(2 * ticket + 1)]
            while director.reply(2 * ticket) is None:
                yield traffic(director)
                tiny_engine.check_integrity()
            if director.reply(2 * ticket).error is None:
                swapped.append(spec)
            yield from ([*traffic(director)] for _ in range(3))
        while in_flight:
            in_flight.difference_update(o.id for e in director.of(Stepped)[-1:] for o in e.outputs if o.finish_reason)
            yield []

    in_flight = set()
    limits = Limits(tiny_engine.config.max_expanded)
    director = play(scene, tiny_engine, spec="echo", limits=limits, switch={"deadline": 5.0})
    assert len(swapped) == 20
    assert len({stats.controller for stats in director.stats}) == len(SPECS) + 1, "a controller never decided"
    assert sum(stats.step.accepted for stats in director.stats) > 20, "hardly any speculation: the test shows little"
    assert not any(director.stats[-1].fallbacks.values())
    assert all(director.reply(2 * ticket + 1).error is None for ticket in range(1, 31))
    record = serve(tiny_engine, build_controller("none"), sent, concurrency=6)
    plain = {request.id: list(request.tokens) for request in record.requests}
    assert len(plain) > 40
    for request_id, tokens in director.tokens.items():
        assert tokens == plain[request_id][: len(tokens)] if request_id in cancelled else tokens == plain[request_id]
    assert tiny_engine.block_manager.used_share == 0.0


def test_a_swap_takes_effect_between_two_steps_and_says_who_was_before():
    def scene(director):
        yield [long_request(), SetController(1, "chain:steps=2")]
        yield from director.until_reply(1)
        yield from quiet(2)

    director = play(scene)
    specs = [stats.controller for stats in director.stats]
    change = specs.index("chain:steps=2")
    assert set(specs[:change]) == {"none"} and set(specs[change:]) == {"chain:steps=2"}
    assert [stats.step.depth for stats in director.stats][change] == 2
    assert director.reply(1).value == {"controller": "chain:steps=2", "previous": "none", "swaps": 1}


@pytest.mark.parametrize("spec", BROKEN)
def test_a_controller_that_cannot_be_built_changes_nothing(spec):
    def scene(director):
        yield [long_request(), SetController(1, spec)]
        yield from director.until_reply(1)
        yield from [[Inspect(2)], []]

    director = play(scene, spec="chain")
    assert director.reply(1).error
    assert {stats.controller for stats in director.stats} == {"chain"}
    assert director.reply(2).value["controller"] == "chain"


def test_a_first_controller_that_cannot_be_built_is_an_error_at_once():
    with pytest.raises(ConfigError):
        play(lambda director: iter([]), spec="nonsense")


def test_serving_goes_on_while_a_controller_is_built_and_a_build_that_hangs_is_given_up():
    def make(spec):
        if spec == "slow":
            time.sleep(4.0)
        return build_controller(spec)

    def scene(director):
        yield [long_request(), SetController(1, "slow"), SetController(2, "chain")]
        yield from director.until_reply(2)

    director = play(scene, make=make, switch={"build_seconds": 1.0})
    assert "not built within 1 s" in director.reply(1).error
    assert director.reply(2).value["controller"] == "chain"
    before = director.events.index(director.reply(1))
    assert before > 20, "steps must go on"


def test_a_controller_that_fails_its_trial_makes_way_for_the_one_before():
    def scene(director):
        yield [long_request(), SetController(1, "chain:steps=2")]
        yield from director.until_reply(1)
        yield [SetController(2, "bad")]
        yield from director.until_reply(2)
        yield from quiet(40)
        yield [Inspect(3)]

    director = play(scene, make=make_with_bad(fail), switch={"deadline": 5.0})
    counts = Counter(stats.controller for stats in director.stats)
    assert counts["bad"] == 19, "its twentieth fault throws it out"
    assert director.stats[-1].controller == "chain:steps=2"
    assert [stats.rollbacks for stats in director.stats].index(1) > 20 and director.stats[-1].rollbacks == 1
    held = director.reply(3).value
    assert held["rollbacks"] == 1 and held["retired"] is None and held["fallbacks"]["exception"] == 20


def test_a_controller_retired_after_its_trial_stays_under_the_fallback():
    def scene(director):
        yield [long_request(), SetController(1, "bad")]
        yield from director.until_reply(1)
        yield from quiet(40)
        yield [Inspect(3)]

    director = play(scene, make=make_with_bad(fail), spec="chain", switch={"trial_steps": 5, "deadline": 5.0})
    held = director.reply(3).value
    assert held["controller"] == "bad" and "20 faults" in held["retired"] and held["rollbacks"] == 0
    assert director.stats[-1].step.depth == 0, "the fallback of these tests doesn't speculate"


def test_a_controller_that_hangs_stops_nobody():
    def scene(director):
        yield [long_request(), SetController(1, "bad")]
        yield from director.until_reply(1)
        until = time.monotonic() + 1.0
        while time.monotonic() < until or len(director.stats) <= 100:
            yield []
        assert time.monotonic() < until + 20.0
        yield [Inspect(2)]

    director = play(scene, make=make_with_bad(lambda: time.sleep(30.0)), switch={"deadline": 0.05})
    assert director.reply(2).value["rollbacks"] == 1


class Strict(ServedFake):
    """Refuses the decision of its n-th steps."""

    def __init__(self, *refused: int) -> None:
        super().__init__(0.0)
        self.refused, self.tries = refused, 0

    def step(self, controller):
        self.tries += 1
        if self.tries in self.refused:
            raise PlanViolation("more than the engine allows")
        return super().step(controller)


def test_a_violation_that_passed_the_guard_costs_the_controller_its_place_and_nobody_a_token():
    def scene(director):
        yield [long_request("a", 12)]
        yield from quiet(12)
        yield [Inspect(1)]

    director = play(scene, Strict(3), spec="chain")
    assert len(director.tokens["a"]) == 12
    assert "more than the engine allows" in director.reply(1).value["retired"]


def test_an_engine_that_refuses_every_decision_is_dead():
    with pytest.raises(PlanViolation):
        play(lambda director: iter([[long_request()], *quiet(9)]), Strict(2, 3, 4))


# ----------------------------------------------------------------------------- experiments


def start(ticket=1, control="none", treatment="chain:steps=2", blocks=4, harm=1.0, block_seconds=1e-4):
    return StartExperiment(ticket, ExperimentOptions(control, treatment, block_seconds, blocks, harm, seed=3))


@pytest.fixture
def clocked(monkeypatch):
    """An engine each of whose steps takes a millisecond by the core's clock, however busy the machine is."""
    clock = count(0.0, 0.001)
    monkeypatch.setattr(engine_core, "time", SimpleNamespace(time=time.time, perf_counter=clock.__next__))
    return ServedFake(0.0)


def test_an_experiment_alternates_its_arms_and_leaves_the_control_in_force(clocked):
    def scene(director):
        yield [long_request(), start()]
        yield from director.until_reply(1)
        yield [SetController(2, "eagle3"), start(3)]
        while not director.of(ExperimentReport) or director.of(ExperimentReport)[-1].state == "running":
            yield []
        yield from [[Inspect(4)], []]

    director = play(scene, clocked, spec="eagle3", switch={"deadline": 5.0})
    reports = director.of(ExperimentReport)
    assert [report.state for report in reports] == ["running"] * 8 + ["done"]
    assert reports[0].value["ratio"] is None and reports[-1].value["blocks"] == {"control": 4, "treatment": 4}
    assert reports[-1].value["ratio"]["estimate"] > 1.5, "three tokens a step against one"
    for ticket in (2, 3):
        assert "an experiment is running" in director.reply(ticket).error
    assert {"none", "chain:steps=2"} <= {stats.controller for stats in director.stats}
    assert director.stats[-1].controller == director.reply(4).value["controller"] == "none"


def test_a_harmful_treatment_is_stopped_early(clocked):
    def scene(director):
        yield [long_request(), start(control="chain:steps=4", treatment="none", blocks=50)]
        yield from director.until_reply(1)
        while director.of(ExperimentReport)[-1].state == "running":
            yield []

    director = play(scene, clocked, switch={"deadline": 5.0})
    last = director.of(ExperimentReport)[-1]
    assert last.state == "harm" and last.value["blocks"]["treatment"] < 10
    assert director.reply(1).value["state"] == "running"


def test_a_treatment_that_is_retired_ends_its_experiment():
    def scene(director):
        yield [long_request(), start(treatment="bad", block_seconds=60.0)]
        yield from director.until_reply(1)
        while director.of(ExperimentReport)[-1].state == "running":
            yield []
            assert len(director.events) < 10**5
        yield [Inspect(2)]

    director = play(scene, make=make_with_bad(fail), spec="chain", switch={"deadline": 5.0})
    last = director.of(ExperimentReport)[-1]
    assert last.value["reason"].startswith("treatment is retired") and last.state == "harm"
    assert director.reply(2).value["controller"] == last.value["controller"] == "none"


def test_a_control_that_is_retired_makes_way_for_who_decided_before():
    def scene(director):
        yield [long_request(), start(control="bad", treatment="none", blocks=10**4, harm=0.0)]
        yield from director.until_reply(1)
        while director.of(ExperimentReport)[-1].state == "running":
            yield []
            assert len(director.events) < 10**5
        yield [Inspect(2)]
        yield from quiet(5)

    director = play(scene, make=make_with_bad(fail), spec="chain", switch={"deadline": 5.0})
    last, held = director.of(ExperimentReport)[-1], director.reply(2).value
    assert last.value["reason"].startswith("control is retired") and last.state == "stopped"
    assert held["controller"] == last.value["controller"] == director.stats[-1].controller == "chain"
    assert held["retired"] is None and director.stats[-1].fallbacks["exception"] == held["fallbacks"]["exception"]


def test_an_experiment_is_stopped_by_hand_once():
    def scene(director):
        yield [StopExperiment(1), long_request(), start(2)]
        yield from director.until_reply(2)
        yield [StopExperiment(3), StopExperiment(4)]
        yield []

    director = play(scene)
    assert director.reply(1).error == director.reply(4).error == "no experiment is running"
    assert director.reply(3).value["state"] == "stopped"
    assert director.of(ExperimentReport)[-1].value["reason"] == "stopped by hand"


@pytest.mark.parametrize(
    "bad",
    [{"control": "nonsense"}, {"treatment": "nonsense"}, {"control": "chain:steps=0"}, {"treatment": "chain:steps=0"}],
)
def test_an_experiment_that_makes_no_sense_is_refused(bad):
    def scene(director):
        yield [start(**bad)]
        yield from director.until_reply(1)

    director = play(scene)
    assert director.reply(1).error
    assert not director.of(ExperimentReport)


# ----------------------------------------------------------------------------- what a step tells


def test_a_step_tells_what_the_controller_chose_and_the_knee(make_controller_profile):
    def scene(director):
        yield [long_request("a"), long_request("b"), Submit(Request("c", (1, 2), speculate=False))]
        yield from quiet(3)

    director = play(scene, spec="chain:steps=2", profile=make_controller_profile)
    stats = director.stats[1]
    assert (stats.step.budget, stats.step.depth, stats.step.width) == (6, 2, 1)
    assert stats.knee == make_controller_profile.knee(3, 1.0) > 0
    assert director.stats[0].knee == 0, "nobody decoded"
    assert stats.step.seconds > 0 and abs(stats.step.end - time.time()) < 60


@pytest.fixture
def make_controller_profile():
    return CostProfile.default()


def test_trees_are_sent_while_somebody_watches(tiny_engine):
    def scene(director):
        yield [Submit(prompt_of(1)), Submit(prompt_of(2)), Submit(prompt_of(5))]
        yield from quiet(3)
        yield [TraceTrees(True)]
        yield from quiet(3)
        yield [TraceTrees(False)]
        yield from quiet(3)

    director = play(scene, tiny_engine, spec="chain:steps=2", limits=Limits(40))
    trees = [len(stats.trees) for stats in director.stats]
    assert trees[:4] == [0] * 4 and trees[4:8] == [2] * 4 and trees[8:] == [0] * len(trees[8:])
    shown = director.stats[5]
    assert {tree.id for tree in shown.trees} == {"r1", "r2"}, "r5 asked not to speculate"
    assert shown.batch == 3 and shown.committed == 3 + shown.step.accepted


def test_a_plan_is_cut_to_the_engines_limits(tiny_engine):
    def scene(director):
        yield [Submit(prompt_of(1))]
        yield from quiet(5)

    director = play(scene, tiny_engine, make=lambda spec: Bad(lambda: SpecPlan(8, 8, 20)), limits=Limits(40))
    assert director.stats[2].step.depth == 8 and director.stats[2].step.width == 5
    assert not any(director.stats[-1].fallbacks.values())
