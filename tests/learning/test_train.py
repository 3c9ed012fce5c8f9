"""Training on replays: demonstrations and cloning, the held-out score, and the whole run from a config."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tyro

from echo_rl.cli.train import Train
from echo_rl.codec import FEATURES, ActionTable
from echo_rl.contracts import SpecPlan
from echo_rl.controllers import make
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.policy import network
from echo_rl.controllers.policy.network import Policy
from echo_rl.controllers.policy.ppo import Ppo, PpoOptions, Steered
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, HeldOutError
from echo_rl.learning.clone import CloneOptions, Demonstrations, Scene, agreement, clone, demonstrate
from echo_rl.learning.learner import LearnerOptions, build
from echo_rl.learning.play import HeldOut, World, measure, play
from echo_rl.learning.train import TrainConfig, TrainingInputs, make_score, train
from echo_rl.replay.backend import ReplayBackend
from echo_rl.replay.machines import another
from echo_rl.replay.trace import Trace
from echo_rl.workloads.datasets import SUITES

TABLE = ActionTable()
PROFILE = CostProfile.load(packaged("profile.json"))
GATES = GateCalibration.load(packaged("gates.json"))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace.packaged()


@pytest.fixture(scope="module")
def world(trace) -> World:
    return World(trace, BatchedCostProfile(PROFILE), noise=False)


def steered(*knobs: int) -> Steered:
    controller = Steered(GATES)
    controller.steer(SpecPlan(*knobs))
    return controller


# --- playing


@pytest.mark.parametrize("workload", ["closed:1", "closed:8", "closed:32", "poisson:2"])
def test_plain_decoding_is_exactly_as_fast_as_plain_decoding(world, workload):
    """Whatever prompts arrive meanwhile: their first tokens are nobody's merit."""
    assert measure(world, make("none"), workload, 60, seed=0).speedup == pytest.approx(1.0, abs=1e-9)


def test_speed_is_deterministic_and_tells_controllers_apart(world):
    noisy = replace(world, noise=True)
    speeds = [measure(noisy, make("chain", steps=3), "closed:2", 40, seed) for seed in (0, 0, 1)]
    assert speeds[0] == speeds[1] != speeds[2]
    assert measure(world, make("chain", steps=3), "closed:1", 80, 0).speedup > 1.05


def test_plans_past_the_trace_are_cut_to_it(world, trace):
    wide = steered(20, trace.max_depth + 2, trace.max_width + 5)
    plans = [served.report.plan for _, _, served in play(world, wide, "closed:1", 3, 0)]
    assert {(p.max_depth, p.width) for p in plans} == {(trace.max_depth, trace.max_width)}


def test_a_player_that_stops_early_leaves_no_request(world, monkeypatch):
    made = []
    init = ReplayBackend.__init__
    monkeypatch.setattr(ReplayBackend, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    before = threading.active_count()
    played = play(world, make("none"), "closed:2", 50, 0)
    next(played)
    assert made[0].has_work
    played.close()
    assert not made[0].has_work and threading.active_count() == before


def test_scores_are_relative_to_the_baselines(world):
    made = []

    def baseline():
        made.append(1)
        return make("chain", steps=3)

    held = HeldOut([world], lambda policy: make("chain", steps=3), ("closed:1", "closed:4"), 30, 0, {"chain": baseline})
    first, second = held(None), held(None)
    assert first == second and made == [1, 1]  # one a workload, measured once
    assert first["over_chain"] == first["over_chain/closed:1"] == pytest.approx(1.0)
    mean = (first["speedup/closed:1"] * first["speedup/closed:4"]) ** 0.5
    assert first["speedup"] == pytest.approx(mean)


def test_every_workload_is_scored_on_every_machine(world):
    slow = replace(world, costs=BatchedCostProfile(another(PROFILE, np.random.default_rng(0))))
    held = HeldOut([world, slow], lambda policy: make("chain", steps=3), ("closed:1", "closed:4"), 30, 0, {})
    scores = held(None)
    assert list(scores) == ["speedup", *(f"speedup/{w}" for w in ("closed:1", "closed:4", "closed:1@1", "closed:4@1"))]
    assert scores["speedup/closed:1"] != scores["speedup/closed:1@1"]
    alone = HeldOut([world], lambda policy: make("chain", steps=3), ("closed:1", "closed:4"), 30, 0, {})(None)
    assert alone["speedup/closed:4"] == scores["speedup/closed:4"]


# --- cloning


def test_cloning_reproduces_a_rule(make_env):
    """A rule of the load and of acceptance: more than 90 % of every knob's choices, on observations not trained on."""
    g = np.random.default_rng(0)

    def rule(x):
        quiet, good = x[:, 0] < 0.5, x[:, 6] > 0.5
        columns = (np.where(quiet, 6, 3), np.where(good, 5, 2), np.where(quiet & good, 3, 1), np.full(len(x), 2))
        columns += (np.where(good, 1, 4),)
        return np.stack(columns, axis=1)

    x = g.random((6000, len(FEATURES))).astype(np.float32)
    policy = build(LearnerOptions(), make_env()).policy
    options = CloneOptions(epochs=25)
    assert min(agreement(policy, Demonstrations(x, rule(x)))) < 0.5  # not before
    clone(policy, Demonstrations(x[:5000], rule(x[:5000])), options, seed=0)
    assert min(agreement(policy, Demonstrations(x[5000:], rule(x[5000:])))) > 0.9


def test_plain_demonstrations_teach_nothing_of_the_other_knobs(make_env):
    x = np.zeros((64, len(FEATURES)), np.float32)
    plain, deep = np.tile([0, 0, 0, 0, 0], (32, 1)), np.tile([5, 6, 3, 2, 1], (32, 1))
    policy = build(LearnerOptions(), make_env()).policy
    found = clone(policy, Demonstrations(x, np.concatenate([plain, deep])), CloneOptions(epochs=40), seed=0)
    assert found[1:] == (1.0, 1.0, 1.0, 1.0)  # contradictory only where it doesn't matter


def test_demonstrations_are_the_controllers_decisions(world):
    scene = Scene([world], PROFILE, TABLE, GATES.sparse(8), ("closed:1", "closed:4"), repeat=4, horizon=5)
    shown = demonstrate(scene, lambda: make("chain", steps=3), CloneOptions(steps=160, disturbed=0.0), seed=0)
    assert shown.observations.shape == (40, len(FEATURES)) and shown.observations.dtype == np.float32
    assert {tuple(row) for row in shown.actions.tolist()} == {TABLE.nearest(3, 3, 1)}
    batches = np.rint(2.0 ** (6.0 * shown.observations[:, 0]))
    assert (batches[:20] == 1).all() and batches[20:].max() == 4
    last_depth = shown.observations[:, 18]
    assert (last_depth[::5] == 0).all() and (last_depth[1::5] > 0).all()  # statistics begin anew every horizon


def test_disturbed_decisions_are_seen_but_never_taught(world):
    scene = Scene([world], PROFILE, TABLE, GATES.sparse(8), ("closed:2",), repeat=2, horizon=1000)
    shown = demonstrate(scene, lambda: make("chain", steps=3), CloneOptions(steps=200, disturbed=0.5), seed=0)
    assert {tuple(row) for row in shown.actions.tolist()} == {TABLE.nearest(3, 3, 1)}
    other = np.abs(shown.observations[1:, 18] - 3 / 8) > 1e-6
    assert 0.25 < other.mean() < 0.75  # the last depth is often not the controller's own


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"epochs": 0}, {"lr": 0.0}, {"smoothing": 1.0}, {"disturbed": 1.0}])
def test_bad_clone_options_are_refused(wrong):
    with pytest.raises(ConfigError, match="cloning needs"):
        CloneOptions(**wrong)


# --- the whole run


@pytest.fixture
def config(tmp_path, trace) -> TrainConfig:
    trace.subset(range(12)).save(tmp_path / "trace.safetensors")
    return TrainConfig(
        out=tmp_path / "run", trace=tmp_path / "trace.safetensors", profile=packaged("profile.json"),
        calibration=packaged("gates.json"), workloads=("closed:1", "closed:4"), lanes=4, horizon=8, repeat=2,
        evaluate_on=("closed:2",), evaluation_steps=20, clone=CloneOptions(steps=80, epochs=5),
        learner=LearnerOptions(steps=128, n_steps=16, net=(16,), evaluate_every=1, checkpoint_every=1),
    )  # fmt: skip


def test_a_run_leaves_a_policy_that_serves(config, world):
    done = train(config)
    manifest = json.loads((done.policy / "manifest.json").read_text())
    assert done.steps == 128 and [point["step"] for point in done.curve] == [0, 64, 128]
    assert {"speedup", "over_echo", "speedup/closed:2"} <= manifest["metrics"].keys()
    trained = manifest["trained"]
    assert trained["profile"].startswith(PROFILE.provenance) and trained["config"]["workloads"] == [
        "closed:1",
        "closed:4",
    ]
    assert not {"table", "features", "trace"} & trained["config"].keys()  # said elsewhere
    assert trained["config"]["learner.seed"] == 0 and trained["cloned"]["demonstrations"] == 40
    assert trained["steps"] in (0, 64, 128) and manifest["repeat"] == 2 and "commit" in manifest
    policy = Policy.load(done.policy)
    ppo = Ppo(PpoOptions(policy, PROFILE, GATES))
    assert measure(world, ppo, "closed:2", 20, 0).tokens > 0 and ppo.fallbacks == 0


def test_the_kept_policy_scores_again_what_its_manifest_says(config):
    done = train(config, baselines={})
    score = make_score(config, TrainingInputs.load(config), {})
    assert score(Policy.load(done.policy)) == json.loads((done.policy / "manifest.json").read_text())["metrics"]
    assert done.best["speedup"] == max(point["speedup"] for point in done.curve)


def test_a_rerun_goes_on_and_another_config_is_refused(config):
    train(config, baselines={})
    longer = replace(config, learner=replace(config.learner, steps=192))
    done = train(longer, baselines={})
    assert done.steps == 192 and [point["step"] for point in done.curve] == [0, 64, 128, 192]
    with pytest.raises(ConfigError, match="another learner.gamma; use another out folder"):
        train(replace(config, learner=replace(config.learner, gamma=0.5)), baselines={})


def test_a_state_of_another_codec_or_action_table_is_not_continued(config, monkeypatch):
    train(config, baselines={})
    longer = replace(config, learner=replace(config.learner, steps=192))
    monkeypatch.setattr(network, "CODEC_VERSION", network.CODEC_VERSION + 1)
    with pytest.raises(ConfigError, match="another codec_version; use another out folder"):
        train(longer, baselines={})
    monkeypatch.undo()
    monkeypatch.setattr(
        "echo_rl.learning.train.ActionTable", lambda: ActionTable(floors=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    )
    with pytest.raises(ConfigError, match="another floors; use another out folder"):
        train(longer, baselines={})


def test_workloads_are_checked_before_anything_is_learned(config, trace, monkeypatch):
    with pytest.raises(ConfigError, match="close"):
        replace(config, evaluate_on=("close:8",))
    monkeypatch.setattr("echo_rl.learning.train._clone_echo", lambda *_: pytest.fail("too late"))
    trace.subset([i for i, r in enumerate(trace.responses) if r.suite == "gsm8k"][:12]).save(config.trace)
    for change in ({"evaluate_on": ("shift:5,4",)}, {"workloads": ("shift:5,4",)}):
        with pytest.raises(ConfigError, match="needs requests of"):
            train(replace(config, **change), baselines={})


def test_evaluation_never_sees_a_prompt_of_training(config):
    inputs = TrainingInputs.load(config)
    served = Trace.load(config.trace).split(config.held_out)[1]  # as `echo-rl eval` and `ab` take it
    parts = [{r.prompt for r in t.responses} for t in (inputs.training, inputs.selection, served)]
    assert all(parts) and not any(a & b for a, b in combinations(parts, 2))


def test_recordings_of_suites_that_are_held_out_are_refused(config, monkeypatch):
    monkeypatch.setitem(SUITES, "gsm8k", replace(SUITES["gsm8k"], held_out=True))
    with pytest.raises(HeldOutError, match="gsm8k is held out"):
        train(config, baselines={})


ONE_STEP = {"lanes": 1, "learner": LearnerOptions(n_steps=1)}


@pytest.mark.parametrize("wrong", [{"lanes": 0}, {"workloads": ()}, {"hidden": ("cots",)}, {"seed": -1}, ONE_STEP])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        TrainConfig(**wrong)


def test_the_command_line_reaches_every_level_of_the_config():
    command = tyro.cli(
        Train, args=["--out", "x", "--workloads", "closed:3", "--learner.gamma", "0.5", "--clone.steps", "0",
                     "--reward.form", "throughput", "--learner.net", "8", "8"],
    )  # fmt: skip
    options = command.options
    assert (str(options.out), options.workloads, options.learner.gamma) == ("x", ("closed:3",), 0.5)
    assert (options.clone.steps, options.reward.form, options.learner.net) == (0, "throughput", (8, 8))
