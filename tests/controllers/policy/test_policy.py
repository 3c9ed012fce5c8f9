"""A learned policy as a controller: its folder, what is refused, what happens when it fails, budget and cost."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.codec import CALIBRATED, CODEC_VERSION, FEATURES, ActionTable
from echo_rl.contracts import AUTOREGRESSIVE, LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers import make
from echo_rl.controllers.echo.echo import Echo, EchoOptions
from echo_rl.controllers.echo.gates import DepthGate, GateCalibration
from echo_rl.controllers.policy.network import MANIFEST_FILE, WEIGHTS_FILE, Layer, Policy
from echo_rl.controllers.policy.ppo import Ppo, PpoOptions, Steered
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, EchoError, PolicyError
from tests.policies import SIZES, constant_policy

GATES = GateCalibration((DepthGate(0, 0.2), DepthGate(2, 0.35)), (0, 2), score_power=(1.0, 1.5))
AGAIN = "train again"


def random_policy(seed: int = 0, repeat: int = 1, net: tuple[int, ...] = (64, 64), activation: str = "tanh") -> Policy:
    g = np.random.default_rng(seed)
    sizes = (len(FEATURES), *net, sum(SIZES))
    layers = tuple(
        Layer(g.normal(size=(o, i)).astype(np.float32), g.normal(size=o).astype(np.float32)) for i, o in pairwise(sizes)
    )
    return Policy(layers, repeat=repeat, activation=activation)


@pytest.fixture
def folder(tmp_path):
    random_policy().save(tmp_path, {"trained": {"steps": 7}, "metrics": {"speedup": 1.5}, "commit": "abc"})
    return tmp_path


@pytest.fixture
def serve(make_profile):
    return lambda policy, **options: Ppo(PpoOptions(policy, make_profile(), GATES, **options))


def report_of(load, plan) -> StepReport:
    return StepReport(load, plan, (), 4, 4, 2, 3, (1, 1), (1, 0), PhaseTimes(verify=0.01, draft=0.002), (1,), (0.5,))


def change_manifest(folder, **changes):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_beside_prompts_it_is_held_to_what_still_pays(serve):
    ppo = serve(constant_policy((3, 2, 0, 0, 0)))  # a node a request
    reading = LoadView(16, 64, 0, 128.0, 0.1, 64)
    assert ppo.plan(replace(reading, prefill_tokens=0)).budget == 16
    assert ppo.plan(reading) == AUTOREGRESSIVE
    assert ppo.plan(replace(reading, batch_size=2)).budget == 2


# --- the folder


@pytest.mark.parametrize(("net", "activation"), [((64, 64), "tanh"), ((16,), "relu"), ((), "tanh")])
def test_a_saved_policy_says_the_same(net, activation, tmp_path):
    policy = random_policy(3, repeat=5, net=net, activation=activation)
    policy.save(tmp_path, {})
    loaded = Policy.load(tmp_path)
    x = np.random.default_rng(0).normal(size=(50, len(FEATURES))).astype(np.float32)
    assert np.array_equal(loaded.logits(x), policy.logits(x))
    assert (loaded.repeat, loaded.activation, loaded.table, loaded.hidden) == (5, activation, ActionTable(), net)
    assert not list(tmp_path.glob(".*"))  # no half-written neighbour is left


def test_the_manifest_tells_what_the_policy_is_and_where_it_comes_from(folder):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["codec_version"] == CODEC_VERSION and manifest["features"] == [name for name, *_ in FEATURES]
    assert manifest["table"] == {name: list(column) for name, column in asdict(ActionTable()).items()}
    assert (manifest["hidden"], manifest["activation"], manifest["repeat"]) == ([64, 64], "tanh", 1)
    assert manifest["trained"] == {"steps": 7} and manifest["metrics"] == {"speedup": 1.5}
    assert manifest["commit"] == "abc" and re.fullmatch("[0-9a-f]{64}", manifest["sha256"])


def test_facts_of_the_training_cannot_overwrite_what_binds_the_policy(tmp_path):
    random_policy().save(tmp_path, {"codec_version": 99, "sha256": "0"})
    assert Policy.load(tmp_path).hidden == (64, 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MANIFEST_FILE).unlink(), "no policy at .*give the folder of an exported policy"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"kind"'), "damaged.*copy the folder again"),
        (lambda f: (f / MANIFEST_FILE).write_text("[]"), "not the manifest of a policy.*give the folder"),
        (lambda f: change_manifest(f, version=99), f"format 99, this release reads 1.*{AGAIN}"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), "cannot read .*copy the folder again"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-9]), "damaged.*copy it again"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "damaged.*copy it again"),
        (lambda f: change_manifest(f, codec_version=0), f"codec version 0, this release has {CODEC_VERSION}.*{AGAIN}"),
        (lambda f: change_manifest(f, features=["one"]), f"1 features, this release has {len(FEATURES)}.*{AGAIN}"),
        (lambda f: change_manifest(f, features=None), f"no features.*{AGAIN}"),
        (
            lambda f: change_manifest(f, features=["moon phase", *[n for n, *_ in FEATURES[1:]]]),
            f"other features \\(moon phase\\).*{AGAIN}",
        ),
        (
            lambda f: change_manifest(f, table={**asdict(ActionTable()), "depths": [1, 2, 3, 4, 5, 6, 7, 7]}),
            f"another action table.*{AGAIN}.*`table`",
        ),
        (lambda f: change_manifest(f, hidden=[64]), AGAIN),
        (lambda f: change_manifest(f, hidden=[64, 32]), f"its manifest says \\[64, 32\\].*{AGAIN}"),
        (lambda f: change_manifest(f, repeat=0), f"repeat is 0.*{AGAIN}"),
        (lambda f: change_manifest(f, activation="sine"), f"'sine'.*{AGAIN}"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(damage, message, folder):
    damage(folder)
    with pytest.raises(PolicyError, match=f"(?s){message}"):
        Policy.load(folder)


def test_a_file_with_a_right_checksum_may_still_be_no_weights(folder):
    (folder / WEIGHTS_FILE).write_bytes(b"nothing")
    change_manifest(folder, sha256=hashlib.sha256(b"nothing").hexdigest())
    with pytest.raises(PolicyError, match="not a safetensors file.*copy it again"):
        Policy.load(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    policy = random_policy()
    policy.layers[1].weight[3, 5] = np.nan
    policy.save(tmp_path, {})
    with pytest.raises(PolicyError, match=f"not finite.*{AGAIN}"):
        Policy.load(tmp_path)


def test_another_table_is_served_where_it_is_asked_for(tmp_path):
    other = ActionTable(nodes=(0.0, 1.0), depths=(1, 2), widths=(1,), gates=(CALIBRATED,), floors=(0.0,))
    weight = np.zeros((sum(other.sizes), len(FEATURES)), np.float32)
    Policy((Layer(weight, weight[:, 0]),), other).save(tmp_path, {})
    assert Policy.load(tmp_path, other).table == other
    with pytest.raises(PolicyError, match="another action table"):
        Policy.load(tmp_path)


def test_layers_must_fit_the_codec_and_the_table():
    policy = random_policy()
    with pytest.raises(PolicyError, match="features"):
        replace(policy, layers=policy.layers[1:])
    with pytest.raises(PolicyError, match="logits"):
        replace(policy, layers=policy.layers[:-1])


def test_policy_errors_are_user_errors():
    assert issubclass(PolicyError, ConfigError) and issubclass(PolicyError, EchoError)


@pytest.mark.parametrize("options", [{"deterministic": 1}, {"seed": -1}, {"seed": "x"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="ppo"):
        PpoOptions(**options)


# --- deciding


def test_actions_are_the_likeliest_of_each_knob():
    assert constant_policy((5, 2, 1, 3, 4)).act(np.zeros(len(FEATURES), np.float32)) == (5, 2, 1, 3, 4)


def test_drawn_actions_follow_the_probabilities():
    policy, g = constant_policy((5, 2, 1, 3, 4)), np.random.default_rng(0)
    drawn = np.array([policy.act(np.zeros(len(FEATURES), np.float32), g) for _ in range(4000)])
    share = float(np.mean(drawn[:, 3] == 3))
    others = len(ActionTable().gates) - 1
    assert abs(share - np.e / (np.e + others)) < 0.03  # logits 1, 0, 0, ...


def test_the_action_becomes_the_plan(serve, make_load):
    table = ActionTable()
    shape = 4 * int(table.nodes[6]), table.depths[3], table.widths[2]
    for gate, floor, gates in (
        (0, 0, ((0, 0.2), (2, 0.35))),  # the calibrated ones
        (1, 0, ()),
        (3, 0, ((0, 0.2), (1, 0.2), (2, 0.2))),
        (0, 4, ((0, 0.3), (1, 0.3), (2, 0.35))),
        (3, 4, ((0, 0.3), (1, 0.3), (2, 0.3))),
    ):
        plan = serve(constant_policy((6, 3, 2, gate, floor))).plan(make_load(4))
        assert plan == SpecPlan(*shape, gates, table.floors[floor])
    assert serve(constant_policy((0, 3, 2, 2, 0))).plan(make_load(4)) == AUTOREGRESSIVE


def test_a_decision_stands_for_its_steps_and_follows_the_batch(serve, make_load):
    policy = constant_policy((6, 3, 2, 2, 0), repeat=3)
    asked = []
    object.__setattr__(policy, "act", lambda *a: (asked.append(1), (6, 3, 2, 2, 0))[1])
    ppo = serve(policy)
    budgets = [ppo.plan(make_load(batch)).budget for batch in (1, 2, 8, 1)]
    assert len(asked) == 2 and budgets == [5, 10, 40, 5]


def test_what_it_learns_of_a_step_reaches_the_next_observation(serve, make_load):
    seen = []
    policy = constant_policy((6, 3, 2, 2, 0))
    object.__setattr__(policy, "act", lambda observation, generator: (seen.append(observation), (6, 3, 2, 2, 0))[1])
    ppo, load = serve(policy), make_load(1)
    ppo.observe(report_of(load, ppo.plan(load)))
    ppo.plan(load)
    names = [name for name, *_ in FEATURES]
    changed = {names[i] for i in np.flatnonzero(seen[0] != seen[1])}
    assert {"last depth (/ 8)", "last width (/ 8)"} <= changed


@pytest.fixture(scope="module")
def profile():
    return CostProfile.load(packaged("profile.json"))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 40), cap=st.integers(0, 64), context=st.floats(0, 2000))
def test_the_plan_never_exceeds_what_the_load_admits(profile, seed, batch, cap, context):
    plan = Ppo(PpoOptions(random_policy(seed), profile, GATES)).plan(LoadView(batch, 0, 0, context, 0.1, cap))
    assert plan.budget <= batch * cap and (cap or not plan.speculates)
    assert plan.max_depth <= 8 and all(depth < plan.max_depth - 1 for depth, _ in plan.gates)


def test_selection_keeps_to_the_budget(serve, make_forest, make_load):
    ppo = serve(constant_policy((3, 2, 2, 2, 0)))  # one node a request
    plan = ppo.plan(make_load(2))
    forest = make_forest([(-1, 0.9), (-1, 0.05), (0, 0.8)], [(-1, 0.5), (-1, 0.3), (0, 0.4)])
    assert plan.budget == ppo.select(forest, plan).size == 2


# --- failing


@pytest.mark.parametrize("fault", ["weights", "raises", "observation"])
def test_a_failing_policy_leaves_the_decision_to_echo(fault, serve, make_load, make_profile, caplog):
    policy = random_policy()
    if fault == "weights":
        policy.layers[0].weight[:] = np.nan
    if fault == "raises":
        object.__setattr__(policy, "act", lambda *a: 1 / 0)
    ppo, echo, load = serve(policy), make("echo", profile=make_profile(), calibration=GATES), make_load(1)
    if fault == "observation":
        ppo._encoder._average = [math.nan] * len(ppo._encoder._average)
    with caplog.at_level(logging.WARNING):
        plans = [ppo.plan(load) for _ in range(3)]
    assert plans == [echo.plan(load) for _ in range(3)] and plans[0].speculates
    assert ppo.fallbacks == 3
    assert len(caplog.records) == 1 and "ECHO" in caplog.text  # said once


def test_echo_decides_only_as_long_as_the_policy_fails(serve, make_load, make_profile):
    policy, answers = constant_policy((6, 3, 2, 2, 0), repeat=2), [None, (6, 3, 2, 2, 0)]

    def act(*_):
        answer = answers.pop(0)
        if answer is None:
            raise RuntimeError("broken")
        return answer

    object.__setattr__(policy, "act", act)
    ppo = serve(policy)
    plans = [ppo.plan(make_load(1)) for _ in range(4)]
    echo = Echo(EchoOptions(make_profile(), GATES))
    assert ppo.fallbacks == 1 and plans[:2] == [
        echo.plan(make_load(1)) for _ in range(2)
    ]  # for one decision, two steps
    assert plans[2] == plans[3] and plans[2].budget == 5


# --- steered


def test_steered_follows_and_selects_as_echo(make_forest, make_load, make_profile):
    steered, echo = Steered(GATES), make("echo", profile=make_profile(), calibration=GATES)
    assert steered.plan(make_load(2)) == AUTOREGRESSIVE
    plan = SpecPlan(3, 3, 2, ((0, 0.2),))
    steered.steer(plan)
    assert steered.plan(make_load(2)) == plan
    echo.plan(make_load(2))
    forest = make_forest([(-1, 0.9), (0, 0.8), (1, 0.7)], [(-1, 0.6), (0, 0.5), (1, 0.4)])
    ours, theirs = steered.select(forest, plan), echo.select(forest, plan)
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.tokens, theirs.tokens)
    floored = SpecPlan(3, 3, 2, floor=0.7)  # calibrated: .9, .8 ** 1.5 = .72, .7 ** 1.5 = .59
    assert steered.select(forest, floored).counts.tolist() == [2, 0]
    steered.steer(SpecPlan(1000, 3, 2))
    assert steered.plan(make_load(2, max_nodes=4)).budget == 8


# --- serving


@pytest.mark.parametrize("module", ["echo_rl.controllers.registry", "echo_rl.controllers.policy.ppo"])
def test_serving_loads_no_training_library(module):
    code = (
        f"import sys, {module}; sys.exit(bool({{'stable_baselines3', 'gymnasium', 'tensorboard'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("batch", [1, 32])
def test_deciding_is_cheap(batch, serve, make_load):
    """About 50 microseconds a step on average, a decision every step; the best of some rounds, against other load."""
    ppo, load = serve(random_policy()), make_load(batch)
    ppo.plan(load)
    rounds = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(100):
            ppo.plan(load)
        rounds.append((time.perf_counter() - begin) / 100)
    assert min(rounds) < 200e-6 and not ppo.fallbacks


def test_a_policy_that_always_speculates_probes_plain_decoding_now_and_then(serve, make_profile):
    """Plain passes take as predicted, passes of 5 rows twice that: seen only by looking."""
    profile, policy = make_profile(), constant_policy((4, 2, 1, 0, 0))
    ppo = serve(policy)
    load, plain = LoadView(1, 0, 0, 128.0, 0.1, 64), []
    for step in range(1200):
        plan = ppo.plan(load)
        plain += [] if plan.speculates else [step]
        rows = 1 + plan.budget
        seconds = profile.verify_seconds(1, rows, 128.0) * (2.0 if plan.speculates else 1.0)
        ppo.observe(replace(report_of(load, plan), verified=plan.budget, times=PhaseTimes(verify=seconds)))
    assert plain[:4] == [8, 25, 58, 123] and 6 <= len(plain) <= 9
    ppo._catch_up()
    assert ppo._encoder._corrector.verify.factor(1) == pytest.approx(1.0, rel=0.05)
    assert ppo._encoder._corrector.verify.factor(rows) == pytest.approx(2.0, rel=0.05)
