"""The PPO set-up: it learns, resumes, exports what it learned, and bootstraps where an episode is cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from echo_rl.codec import FEATURES, GROUPS, ActionTable
from echo_rl.controllers.policy.network import Policy
from echo_rl.errors import ConfigError, PolicyError
from echo_rl.learning.export import export_policy
from echo_rl.learning.learner import STATE_FILE, LearnerOptions, build, fit, torch_threads

OPTIONS = LearnerOptions(
    steps=4096, lr=(3e-3, 1e-3), n_steps=32, batch_size=64, net=(32,), target_kl=None, critic_updates=0,
    evaluate_every=4, checkpoint_every=2,
)  # fmt: skip


def export(policy):
    return export_policy(policy, ActionTable(), repeat=2)


@pytest.fixture
def run(make_env, score, tmp_path):
    def run(options=OPTIONS, env=None, export=export, **more):
        return fit(options, env or make_env(), tmp_path, export, score, **more)

    return run


def test_it_learns_to_name_what_it_is_shown(run, tmp_path):
    _, found = run(replace(OPTIONS, steps=20_480))
    assert found.curve[0]["speedup"] < 0.5 and found.best >= 0.9
    policy = Policy.load(tmp_path / "policy")
    assert policy.repeat == 2 and json.loads((tmp_path / "policy/manifest.json").read_text())["metrics"]


def test_the_kept_policy_is_the_best_evaluated(run, make_env, tmp_path):
    scores = iter((0.2, 0.7, 0.4))
    model, found = fit(
        replace(OPTIONS, steps=2048), make_env(), tmp_path, export, lambda policy: {"speedup": next(scores)}
    )
    kept = json.loads((tmp_path / "policy/manifest.json").read_text())
    assert [point["step"] for point in found.curve] == [0, 1024, 2048] and found.best == 0.7
    assert kept["steps"] == 1024 and kept["metrics"] == {"speedup": 0.7}
    last = export(model.policy)
    assert not np.array_equal(last.layers[0].weight, Policy.load(tmp_path / "policy").layers[0].weight)


def test_a_policy_that_diverged_is_neither_kept_nor_saved(run, tmp_path):
    """Served, ECHO would decide in its stead, and the score be ECHO's."""
    run(replace(OPTIONS, steps=1024))
    kept = (tmp_path / "policy/manifest.json").read_text()

    def diverged(policy):
        torch.nn.init.constant_(policy.action_net.weight, float("nan"))
        return export(policy)

    with pytest.raises(PolicyError, match="diverged; train in a new folder"):
        run(replace(OPTIONS, steps=2048), export=diverged)
    assert (tmp_path / "policy/manifest.json").read_text() == kept
    assert all(bool(t.isfinite().all()) for t in torch.load(tmp_path / STATE_FILE)["policy"].values())


def test_equal_seeds_end_with_equal_weights(make_env, score, tmp_path):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model, _ = fit(replace(OPTIONS, steps=512, seed=seed), make_env(), tmp_path / name, export, score)
        ends.append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_an_interrupted_run_goes_on_where_it_was_saved(run, make_env, tmp_path):
    env, started = make_env(), []

    def start(policy):
        started.append(1)
        return {"cloned": 3}

    env.interrupt_after = 32 * 5 + 7  # in the sixth rollout; states are saved before the first, third, fifth one
    with pytest.raises(KeyboardInterrupt):
        run(env=env, start=start)
    saved = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert saved["steps"] == 4 * 32 * 8
    model, found = run(start=start)
    assert model.num_timesteps == OPTIONS.steps and started == [1] and found.notes == {"cloned": 3}
    steps = [point["step"] for point in found.curve]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == OPTIONS.steps


def test_a_resume_starts_from_the_saved_weights_and_optimizer(run, tmp_path):
    first, _ = run(replace(OPTIONS, steps=512))
    again, _ = run(replace(OPTIONS, steps=512))  # nothing is left to do
    assert again.num_timesteps == 512
    for ours, theirs in zip(again.policy.parameters(), first.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    moments = [m.policy.optimizer.state_dict()["state"][0]["exp_avg"] for m in (first, again)]
    assert torch.equal(*moments) and bool(moments[0].any())
    longer, found = run(replace(OPTIONS, steps=1024))
    assert longer.num_timesteps == 1024 and found.curve[-1]["step"] == 1024


def test_a_folder_of_another_run_is_refused(run, tmp_path):
    run(replace(OPTIONS, steps=256), claim={"repeat": 2})
    with pytest.raises(ConfigError, match="another repeat; use another out folder"):
        run(replace(OPTIONS, steps=512), claim={"repeat": 4})
    (tmp_path / STATE_FILE).write_bytes(b"no state")
    with pytest.raises(ConfigError, match="damaged.*delete it"):
        run(claim={"repeat": 2})


def test_the_exported_policy_acts_as_the_trained_one(make_env):
    for net, activation in (((64, 64), "tanh"), ((16,), "relu"), ((), "tanh")):
        model = build(replace(OPTIONS, net=net, activation=activation), make_env())
        for parameter in model.policy.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        policy = export(model.policy)
        observations = model.observation_space.low + np.random.default_rng(0).random((500, len(FEATURES))) * (
            model.observation_space.high - model.observation_space.low
        )
        observations = observations.astype(np.float32)
        theirs, _ = model.policy.predict(observations, deterministic=True)
        ours = np.array([policy.act(row) for row in observations])
        assert np.array_equal(ours, theirs) and len(np.unique(ours[:, 0])) > 1


def test_hidden_groups_have_no_effect_on_the_exported_policy(make_env):
    model = build(OPTIONS, make_env())
    g = np.random.default_rng(0)
    x = g.random((20, len(FEATURES))).astype(np.float32)
    y = x.copy()
    y[:, slice(*GROUPS["cost"])] += 0.5
    blind = export_policy(model.policy, ActionTable(), 1, hidden=("cost",))
    assert np.array_equal(blind.logits(x), blind.logits(y))
    assert not np.array_equal(export(model.policy).logits(x), export(model.policy).logits(y))


def test_only_the_value_function_learns_at_first(run, make_env):
    fresh = build(OPTIONS, make_env())
    model, _ = run(replace(OPTIONS, steps=2 * 32 * 8, critic_updates=2))
    actor = [(fresh.policy.action_net, model.policy.action_net)]
    critic = [(fresh.policy.value_net, model.policy.value_net)]
    assert all(torch.equal(a.weight, b.weight) for a, b in actor)
    assert not any(torch.equal(a.weight, b.weight) for a, b in critic)
    assert all(p.requires_grad for p in model.policy.parameters())


def test_the_entropy_bonus_falls_and_all_scalars_are_written(run, tmp_path):
    model, _ = run(replace(OPTIONS, steps=1024, entropy=(0.1, 0.02)))
    assert model.ent_coef == pytest.approx(0.02)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    for tag in (
        "serving/tokens_per_second", "serving/speedup", "mean/reward", "mean/gain", "mean/batch", "choice/plain_share",
        "train/approx_kl", "train/explained_variance", "train/entropy_coefficient", "held_out/speedup", "held_out/best",
    ):  # fmt: skip
        assert tag in tags["scalars"], tag
    assert "choice/nodes" in tags["histograms"]
    assert events.Scalars("serving/speedup")[0].value == pytest.approx(1.5)
    assert events.Scalars("serving/tokens_per_second")[0].value == pytest.approx(2.0)
    bonus = [point.value for point in events.Scalars("train/entropy_coefficient")]
    assert bonus == pytest.approx([0.1 - 0.08 * share for share in (0.25, 0.5, 0.75, 1.0)])


def test_gae_by_hand_with_a_truncation(make_env):
    """Three steps, the second one ends an episode by truncation: its value comes from the last observation."""
    gamma, lam = 0.9, 0.8
    env = make_env(lanes=1, horizon=2)
    options = replace(OPTIONS, n_steps=3, batch_size=3, net=(), gamma=gamma, gae_lambda=lam)
    model = build(options, env)
    slopes = torch.zeros(1, len(FEATURES))
    slopes[0, 6:14] = torch.arange(1.0, 9.0)  # the value of an observation is 1 + its target
    model.policy.value_net.weight.data, model.policy.value_net.bias.data = slopes, torch.zeros(1)
    seen = _Watch()
    model._setup_learn(3, seen)
    v0 = 1.0 + float(env._targets[0])
    assert model.collect_rollouts(env, seen, model.rollout_buffer, 3)
    (v1, v2, v3), (r0, r1, r2), (v_cut,) = seen.values, seen.rewards, seen.cuts
    assert v_cut != v2
    d2 = r2 + gamma * v3 - v2
    d1 = r1 + gamma * v_cut - v1  # bootstrapped, but nothing flows back over the cut
    d0 = r0 + gamma * v1 - v0
    expected = [d0 + gamma * lam * d1, d1, d2]
    buffer = model.rollout_buffer
    assert buffer.advantages[:, 0] == pytest.approx(expected, abs=1e-5)
    assert buffer.returns[:, 0] == pytest.approx(np.add(expected, [v0, v1, v2]), abs=1e-5)


class _Watch(BaseCallback):
    """Remembers rewards as the environment gave them, and the value of each following observation."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[float] = []
        self.values: list[float] = []
        self.cuts: list[float] = []  # values of the last observations of cut episodes

    def _on_step(self) -> bool:
        info = self.locals["infos"][0]
        if "terminal_observation" in info:
            self.cuts.append(1.0 + float(info["terminal_observation"][6:14].argmax()))
        self.rewards.append(float(self.locals["rewards"][0]))
        self.values.append(1.0 + float(self.training_env._targets[0]))
        return True


def test_torch_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"gamma": 1.0}, {"clip": 0.0}, {"batch_size": 1}, {"net": (64, 0)}, {"activation": "sine"},
        {"lr": (0.0, 0.0)}, {"entropy": (0.1, -0.1)}, {"threads": 0}, {"seed": -1}, {"seed": 2**31},
        {"target_kl": -1.0}, {"lr": (math.nan, 0.1)}, {"entropy": (0.1, math.nan)}, {"value_weight": math.nan},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        LearnerOptions(**wrong)
