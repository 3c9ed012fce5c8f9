"""The replayed environments: one index of the vector is the single environment, and Gymnasium and SB3 take both."""

from __future__ import annotations

import copy
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import VecMonitor

from echo_rl.codec import CALIBRATED, ActionTable, BatchedObservationEncoder
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.policy.ppo import Steered
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.env.replay_env import ReplayEnv
from echo_rl.env.reward import RewardOptions
from echo_rl.env.spec_env import SpecEnv
from echo_rl.env.vector_env import REFERENCE, ReplayEnvOptions, ReplayVectorEnv
from echo_rl.errors import ConfigError, TraceError
from echo_rl.learning.sb3_env import Sb3VecEnv
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.workloads.arrivals import closed, parse
from tests.recorded import random_trace

TABLE = ActionTable(depths=(1, 2, 3, 4, 5), widths=(1, 2, 3, 4))
WORKLOADS = (closed(2), closed(6), parse("poisson:20"))


@pytest.fixture(scope="module")
def costs() -> BatchedCostProfile:
    return BatchedCostProfile(CostProfile.load(packaged("profile.json")))


def actions_of(count: int, steps: int, seed: int = 0) -> np.ndarray:
    """[steps, count, knobs] random actions."""
    return np.random.default_rng(seed).integers(0, TABLE.sizes, (steps, count, len(TABLE.sizes)))


def options_of(**changed) -> ReplayEnvOptions:
    settings = {"workloads": WORKLOADS, "table": TABLE, "horizon": 7, "gates": ((0, 0.3),), "score_power": (1.0, 1.1)}
    return ReplayEnvOptions(**settings | changed)


def vector(costs, count=3, mode=AutoresetMode.SAME_STEP, **changed) -> ReplayVectorEnv:
    return ReplayVectorEnv(random_trace(), costs, options_of(**changed), count, mode)


def single(costs, **changed) -> ReplayEnv:
    return ReplayEnv(random_trace(), costs, options_of(**changed))


def assert_same(left, right) -> None:
    """Equal to the last bit and in type, whatever it is made of."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, np.ndarray) and left.dtype == object:
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            assert_same(one, other)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    else:
        assert left == right


CASES = [
    {},
    {"action_repeat": 3},
    {"randomise": 0.5},
    {"reward": RewardOptions("goodput"), "reference": REFERENCE},
    {"hidden": ("cost",), "noise": False},
]


@pytest.mark.parametrize("changed", CASES)
def test_every_index_is_the_single_environment_of_its_seed(costs, changed):
    """Observations, rewards and infos in Gymnasium's own form, over episodes that begin anew."""
    together = vector(costs, **changed)
    apart = SyncVectorEnv([lambda: single(costs, **changed)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert together.metadata == apart.metadata
    for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(together, space) == getattr(apart, space)
    assert_same(together.reset(seed=11), apart.reset(seed=11))
    assert together.np_random_seed == apart.np_random_seed == (11, 12, 13)
    for number, actions in enumerate(actions_of(3, 20)):
        assert_same(together.step(actions), apart.step(actions))
        if number == 10:  # one of them begins anew
            mask = np.array([False, True, False])
            assert_same(together.reset(options={"reset_mask": mask}), apart.reset(options={"reset_mask": mask.copy()}))


def test_without_autoreset_the_caller_begins_episodes(costs):
    env = vector(costs, mode="Disabled")
    one = single(costs)
    env.reset(seed=4)
    one.reset(seed=5)
    for actions in actions_of(3, 7):
        *_, truncated, infos = env.step(actions)
        last = one.step(actions[1])
    assert truncated.all() and last[3] and not {"final_obs", "final_info"} & infos.keys()
    observations, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
    observation, info = one.reset()
    assert np.array_equal(observations[1], observation) and infos["workload"].tolist() == [None, info["workload"], None]
    with pytest.raises(ConfigError, match="SameStep or Disabled"):
        vector(costs, mode="NextStep")


@pytest.mark.parametrize("changed", CASES)
def test_the_checkers_of_gymnasium_and_of_sb3_are_content(costs, changed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(single(costs, **changed), skip_render_check=True)
        sb3_check_env(single(costs, **changed), warn=True, skip_render_check=True)


def test_the_replay_backend_gives_the_same_transitions(costs):
    """With one recorded response, so that both draw the same requests."""
    trace = random_trace().subset([3])
    options = options_of(workloads=(closed(3),), noise=False, horizon=40, action_repeat=2)
    backend = ReplayBackend(trace, costs, ReplayOptions(noise=False))
    steered = Steered(GateCalibration((), (), score_power=options.score_power))
    over_backend = SpecEnv(backend, steered, trace.requests(), costs, options, backend.clock, backend.idle)
    env = ReplayEnv(trace, costs, options)
    (expected, info), (seen, told) = over_backend.reset(seed=0), env.reset(seed=0)
    assert info == told
    for action in actions_of(1, 40)[:, 0]:
        np.testing.assert_allclose(expected, seen, rtol=1e-5, atol=2e-3)
        expected, reward, *ends, info = over_backend.step(action)
        seen, ours, *others, told = env.step(action)
        assert ends == others and info.keys() == told.keys()
        assert ours == pytest.approx(reward, rel=1e-6, abs=1e-9)
        assert told == pytest.approx(info, rel=1e-6, abs=1e-9)
    over_backend.close()


def test_a_copy_goes_on_alike_and_apart(costs):
    for env in (single(costs, randomise=0.5), vector(costs, randomise=0.5, shared=True, stagger=True)):
        env.reset(seed=3)
        actions = actions_of(3, 30) if isinstance(env, ReplayVectorEnv) else actions_of(1, 30)[:, 0]
        for action in actions[:5]:
            env.step(action)
        other = copy.deepcopy(env)
        steps = [env.step(action) for action in actions]
        for action, step in zip(actions, steps, strict=True):
            assert_same(other.step(action), step)


def test_bad_actions_change_nothing(costs):
    env, other = single(costs), single(costs)
    env.reset(seed=0), other.reset(seed=0)
    for bad in ([0, 0, 0, 0], [[0] * 5], [0.0] * 5, [99, 0, 0, 0, 0], [-1, 0, 0, 0, 0], "no"):
        with pytest.raises(ConfigError, match="action"):
            env.step(bad)
    assert_same(env.step([5, 2, 0, 2, 0]), other.step([5, 2, 0, 2, 0]))
    for never in (single(costs), vector(costs, 1)):
        with pytest.raises(ConfigError, match="reset"):
            never.step(np.zeros(never.action_space.shape, dtype=np.int64))


@pytest.mark.parametrize("mask", [np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3)])
def test_bad_masks_and_seeds_are_refused(costs, mask):
    with pytest.raises(ConfigError, match="reset_mask"):
        vector(costs).reset(options={"reset_mask": mask})
    with pytest.raises(ConfigError, match="2 seeds for 3"):
        vector(costs).reset(seed=[1, 2])


def test_rendering_is_refused_in_gymnasiums_words(costs):
    with pytest.raises(gymnasium.error.UnsupportedMode, match="human"):
        ReplayEnv(random_trace(), costs, options_of(), render_mode="human")
    with pytest.raises(gymnasium.error.UnsupportedMode, match="rgb_array"):
        ReplayVectorEnv(random_trace(), costs, options_of(), render_mode="rgb_array")
    for env in (single(costs), vector(costs)):
        assert env.render_mode is None and env.metadata["render_modes"] == []
        with pytest.raises(NotImplementedError):
            env.render()


def test_sb3_takes_no_environment_that_would_not_begin_anew(costs):
    with pytest.raises(ConfigError, match="SameStep"):
        Sb3VecEnv(vector(costs, mode="Disabled"))


def small_vector(costs, **options) -> ReplayVectorEnv:
    common = {"workloads": (closed(2), closed(6)), "table": TABLE, "horizon": 6, "action_repeat": 2}
    common |= {"reference": REFERENCE, "shared": True, "stagger": True}
    chosen = ReplayEnvOptions(**common | options)
    return ReplayVectorEnv(random_trace(), costs, chosen, 3)


def small_env(costs, seed=0, **options) -> VecMonitor:
    """The environments as training sees them."""
    return VecMonitor(Sb3VecEnv(small_vector(costs, **options), seed))


@pytest.mark.parametrize("options", [{}, {"randomise": 0.5}, {"hidden": ("cost", "load")}])
def test_equal_seeds_give_equal_transitions(costs, options):
    a, b, c = (small_env(costs, seed, **options) for seed in (1, 1, 2))
    seen = [env.reset() for env in (a, b, c)]
    g = np.random.default_rng(0)
    differ = not np.array_equal(seen[0], seen[2])
    for _ in range(25):
        actions = np.stack([g.integers(0, n, 3) for n in TABLE.sizes], axis=1)
        (oa, ra, da, ia), (ob, rb, db, _), (_, rc, _, _) = (env.step(actions) for env in (a, b, c))
        assert np.array_equal(oa, ob) and np.array_equal(ra, rb) and np.array_equal(da, db)
        assert a.observation_space.contains(oa[0])
        for index in np.flatnonzero(da):
            assert ia[index]["TimeLimit.truncated"] and "terminal_observation" in ia[index]
        differ |= not np.array_equal(ra, rc)
    assert differ


def test_hidden_groups_are_zero_and_unknown_ones_refused(costs):
    observation = small_env(costs, hidden=("cost",)).reset()
    assert (observation[:, 23:] == 0).all() and (observation[:, :6] != 0).any()
    with pytest.raises(ConfigError, match="load, speculation, cost"):
        ReplayEnvOptions(hidden=("weather",))


def test_misjudged_machines_are_seen_as_they_are_once_steps_were_timed(costs):
    """The cost entries start out from the profile and end at what the machine's own costs say."""
    told, misled = (small_vector(costs, randomise=1.0, noise=False, horizon=10**6) for _ in range(2))
    told._encoder = BatchedObservationEncoder(told._machines, 3)  # observations start out from the machines' own
    gaps = []
    (a, _), (b, _) = told.reset(seed=0), misled.reset(seed=0)
    g = np.random.default_rng(0)
    for _ in range(150):
        gaps.append(np.abs(a - b)[:, 23:28].max())
        actions = np.stack([g.integers(0, n, 3) for n in TABLE.sizes], axis=1)
        (a, ra, *_), (b, rb, *_) = told.step(actions), misled.step(actions)
        assert np.array_equal(ra, rb)  # only what is seen differs
    assert gaps[0] > 0.05 and gaps[-1] < 0.25 * gaps[0]


@pytest.mark.parametrize("share, low, high", [(0.0, 0, 0), (0.5, 12, 36), (1.0, 48, 48)])
def test_a_share_of_the_episodes_is_on_other_machines(costs, share, low, high):
    env, met = small_vector(costs, randomise=share), []
    for _ in range(16):
        env.reset(seed=None if met else 0)
        met += [env._machines.machine(index) for index in range(3)]
    assert low <= sum(machine != costs.profile for machine in met) <= high
    with pytest.raises(ConfigError, match="share"):
        ReplayEnvOptions(randomise=1.5)


def test_a_seed_begins_everything_anew(costs):
    """What was learned of usual speeds is forgotten too."""
    env, seen = small_env(costs), []
    for _ in range(2):
        env.seed(5)
        env.reset()
        seen.append(np.stack([env.step(np.tile([5, 3, 2, 1, 2], (3, 1)))[1] for _ in range(20)]))
    assert np.array_equal(*seen)


def test_an_episode_is_as_long_as_its_steps(costs):
    """The first ones too, which end at different times."""
    env = small_env(costs)
    env.reset()
    since, lengths = [0] * 3, []
    for _ in range(12):
        _, _, done, infos = env.step(np.tile([5, 3, 2, 1, 2], (3, 1)))
        since = [steps + 1 for steps in since]
        for index in np.flatnonzero(done):
            assert infos[index]["episode"]["l"] == since[index]
            lengths.append(since[index])
            since[index] = 0
    assert min(lengths) < 6 == max(lengths)


def test_a_table_deeper_than_the_trace_is_refused(costs):
    options = ReplayEnvOptions((closed(2),), ActionTable(depths=(1, 5), widths=(1, 2)))
    with pytest.raises(TraceError, match=r"drafts 5 levels deep, the trace holds 3; record with --depth 5"):
        ReplayVectorEnv(random_trace(depth=3), costs, options, 2)


def test_a_reference_may_have_a_width_that_no_action_has(costs):
    def rewards(widths):
        table = ActionTable(depths=(1, 2, 3), widths=widths)
        options = ReplayEnvOptions((closed(2),), table, reference=((64, (3.0, 2, 3)),), noise=False)
        env = ReplayVectorEnv(random_trace(), costs, options, 2)
        env.reset(seed=4)
        return [env.step(np.array([[4, 1, 0, 0, 0]] * 2))[1] for _ in range(5)]

    np.testing.assert_array_equal(rewards((1,)), rewards((1, 3)))


def test_the_reference_is_what_that_plan_would_have_brought(costs):
    """Taking the reference plan itself leaves a reward of zero, step for step; rewards differ by it alone."""
    table = ActionTable(depths=(1, 2, 3, 4, 5), widths=(1, 2, 3, 4), gates=(CALIBRATED,), floors=(0.0,))
    common = {"workloads": (closed(3),), "table": table, "horizon": 50, "noise": False}
    gates, plans = ((0, 0.3), (1, 0.2)), ((1, (5.0, 4, 4)), (8, (3.0, 3, 3)))
    same = np.tile(table.nearest(3.0, 3, 3), (2, 1))
    other = np.tile(table.nearest(1.0, 2, 2), (2, 1))
    for actions in (same, other):
        taken_off, plain = (
            ReplayVectorEnv(random_trace(), costs, ReplayEnvOptions(**common, gates=gates, reference=chosen), 2)
            for chosen in (plans, ())
        )
        assert np.array_equal(taken_off.reset(seed=4)[0], plain.reset(seed=4)[0])
        for _ in range(20):
            (_, less, *_, infos), (_, full, *_) = taken_off.step(actions), plain.step(actions)
            np.testing.assert_allclose(less, full + infos["reference"], rtol=1e-4, atol=1e-5)
            if actions is same:
                np.testing.assert_allclose(less, 0.0, atol=0.2)  # but for reading prompts


def test_a_trace_of_arrivals_is_a_workload_like_others(costs, tmp_path):
    path = tmp_path / "arrivals.csv"
    path.write_text("time,prompt_tokens,output_tokens\n0,5,3\n0.4,6,2\n0.5,7,4\n")
    env = vector(costs, 2, workloads=(parse(f"trace:{path},2"),), horizon=20)
    _, info = env.reset(seed=0)
    assert set(info["workload"]) == {f"trace:{path},2"}
    copied = copy.deepcopy(env)
    for action in actions_of(2, 30):
        seen, again = env.step(action), copied.step(action)
        assert_same(seen[:2], again[:2])
        assert np.isfinite(seen[0]).all() and np.isfinite(seen[1]).all()
