"""The environment over a fake backend: API, determinism, truncation, bad actions, cleaning up, what is charged."""

from __future__ import annotations

import copy
import gc
import re
import threading
import warnings
import weakref
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from echo_rl.codec import FEATURES, ActionTable
from echo_rl.contracts import (
    AUTOREGRESSIVE,
    LoadView,
    PhaseTimes,
    Request,
    RequestOutput,
    SamplingParams,
    SpecPlan,
    StepReport,
)
from echo_rl.controllers.base import BaseController
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.env.options import SpecEnvOptions
from echo_rl.env.reward import RewardOptions
from echo_rl.env.spec_env import SpecEnv
from echo_rl.errors import ConfigError
from echo_rl.workloads.arrivals import Phase, Workload, closed, parse
from tests import tiny

PLAIN = [0, 0, 0, 2, 0]
CHAIN = [5, 2, 0, 2, 0]  # 3 nodes a request, 3 levels, width 1


class FakeBackend:
    """Two batch places; a prompt takes one step and brings a token; a decoding request gets 1 or 1 + depth tokens.

    A step takes 1/16 s and 1/64 s more for every drafted level. Equal seeds of `restart` give equal coins.
    """

    def __init__(self, places: int = 2) -> None:
        self.places, self.now = places, 0.0
        self.fail: BaseException | None = None
        self.live: dict[str, list[int]] = {}  # id -> [tokens got, tokens wanted]
        self.cancelled: list[str] = []
        self.loads: list[LoadView] = []
        self.threads: set[int] = set()
        self._arrived = 0
        self._load: LoadView | None = None
        self.restart(0)

    def restart(self, seed: int) -> None:
        self._coins, self.now = np.random.default_rng(seed), 0.0

    def clock(self) -> float:
        return self.now

    def idle(self, until: float) -> None:
        self.now = max(self.now, until)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> None:
        assert request.id not in self.live, "ids must be unique"
        self.live[request.id] = [0, request.params.max_new_tokens]
        self._arrived += 1

    def cancel(self, request_id: str) -> None:
        if self.live.pop(request_id, None):
            self.cancelled.append(request_id)
            self._load = None

    def prepare(self) -> LoadView:
        assert self.live and self._load is None, "no work, or prepared twice"
        running = list(self.live)[: self.places]
        decoding = [r for r in running if self.live[r][0]]
        context = float(np.mean([self.live[r][0] for r in decoding])) if decoding else 0.0
        load = LoadView(
            len(decoding), len(running) - len(decoding), len(self.live) - len(running), context, 0.0, 64, self._arrived
        )
        self._arrived = 0
        self.loads.append(load)
        self._load = load
        return load

    def execute(self, plan: SpecPlan, controller) -> StepReport:
        load, self._load = self._load, None
        assert load is not None, "not prepared"
        self.threads.add(threading.get_ident())
        if self.fail is not None:
            raise self.fail
        running = list(self.live)[: self.places]
        decoding = [r for r in running if self.live[r][0]]
        depth = plan.max_depth if plan.speculates else 0
        gains = [1 + depth * int(self._coins.random() < 0.5) for _ in decoding]
        outputs = [self._output(r, gain) for r, gain in zip(decoding, gains, strict=True)]
        outputs += [self._output(r, 1) for r in running if r not in decoding]
        self.now += 1 / 16 + depth / 64
        accepted = sum(gains) - len(gains)
        report = StepReport(
            load, plan, tuple(outputs), plan.budget, min(plan.budget, depth * len(decoding)), accepted, sum(gains),
            (len(decoding),) * depth, (sum(g > 1 for g in gains),) * depth,
            PhaseTimes(verify=1 / 16, draft=depth / 64),
        )  # fmt: skip
        controller.observe(report)
        return report

    def _output(self, request_id: str, gain: int) -> RequestOutput:
        state = self.live[request_id]
        gain = min(gain, state[1] - state[0])
        state[0] += gain
        done = state[0] >= state[1]
        if done:
            del self.live[request_id]
        return RequestOutput(request_id, (7,) * gain, finish_reason="length" if done else None)


class FakeSteered:
    name = "steered"

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.next = AUTOREGRESSIVE

    def steer(self, plan):
        self.next = plan

    def plan(self, load):
        return self.next

    def extend(self, frontier, plan):
        raise AssertionError("the fake drafts nothing")

    select = extend

    def observe(self, report):
        self.reports.append(report)


def costs() -> BatchedCostProfile:
    verify = tuple(tuple((0.05 + 0.001 * max(r, b),) for r in (1, 2, 64)) for b in (1, 2, 64))
    draft = tuple(tuple(tuple(d / 64 for d in (1, 8)) for _ in (1, 8)) for _ in (1, 64))
    return BatchedCostProfile(CostProfile(
        "cpu", "float32", "fake", 1, (1, 2, 64), (1, 2, 64), (128,), verify, (1, 64), (1, 8), (1, 8), draft,
    ))  # fmt: skip


def requests(tokens: tuple[int, ...] = (5, 9, 14)) -> list[Request]:
    return [Request(f"{s}/{n}", (1, 2, n), SamplingParams(max_new_tokens=n)) for s in ("a", "b") for n in tokens]


def make(
    backend: FakeBackend | None = None, *workloads: str | Workload, tokens=(5, 9, 14), overhead=0.0, **options
) -> SpecEnv:
    backend = backend or FakeBackend()
    loads = tuple(parse(w) if isinstance(w, str) else w for w in workloads) or (closed(3),)
    chosen = SpecEnvOptions(workloads=loads, **{"horizon": 10} | options)
    machine = BatchedCostProfile(replace(costs().profile, step_overhead=overhead))
    return SpecEnv(backend, FakeSteered(), requests(tokens), machine, chosen, backend.clock, backend.idle)


@pytest.mark.parametrize("check", [check_env, sb3_check_env])
@pytest.mark.parametrize("workload", ["closed:3", "poisson:2", "bursty:0,20,0.5,1"])
def test_checkers_find_nothing(check, workload):
    env = make(None, workload, "closed:2")
    env.spec = gym.envs.registration.EnvSpec("EchoRL/Fake-v0", entry_point=lambda: make(None, workload, "closed:2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env)
    env.close()


def rollout(env: SpecEnv, seed: int | None, steps: int = 25) -> list[object]:
    rng = np.random.default_rng(5)
    observation, info = env.reset(seed=seed)
    rows: list[object] = [observation.tolist(), info]
    for _ in range(steps):
        observation, *rest = env.step(rng.integers(env.action_space.nvec))
        rows.append((observation.tolist(), *rest))
    return rows


@pytest.mark.parametrize("action_repeat", [1, 3])
def test_equal_seeds_give_equal_transitions(action_repeat):
    workloads = ("closed:3", "poisson:3", "bursty:0,20,0.5,1")
    one, two = make(None, *workloads, action_repeat=action_repeat), make(None, *workloads, action_repeat=action_repeat)
    first = rollout(one, 3)
    assert rollout(two, 3) == first
    assert rollout(two, None) != first and rollout(two, 3) == first, "the past must not matter"
    assert rollout(one, 4) != first


def test_it_only_truncates_and_serves_on_afterwards():
    env = make(horizon=4)
    env.reset(seed=0)
    ends = [env.step(CHAIN)[2:4] for _ in range(9)]
    assert ends == [(False, False)] * 3 + [(False, True)] * 6
    env.reset()
    assert env.step(CHAIN)[2:4] == (False, False)


@pytest.mark.parametrize(
    "action",
    [[13, 0, 0, 0, 0], [0, -1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [[0, 0, 0, 0, 0]], 3,
     [0.0, 1.0, 1.0, 1.0, 1.0], [float("nan")] * 5, [True] * 5, None, "plan"],
)  # fmt: skip
def test_a_bad_action_is_refused_and_nothing_is_lost(action):
    env, other = make(), make()
    env.reset(seed=1), other.reset(seed=1)
    env.step(CHAIN), other.step(CHAIN)
    with pytest.raises(ConfigError):
        env.step(action)
    after, expected = env.step(CHAIN), other.step(CHAIN)
    assert after[0].tolist() == expected[0].tolist() and after[1:] == expected[1:]


def test_a_reset_in_mid_flight_cancels_and_begins_anew():
    backend = FakeBackend()
    env = make(backend)
    env.reset(seed=2)
    fresh = [env.step(CHAIN)[4] for _ in range(3)]
    held = set(backend.live)
    env.reset(seed=2)
    assert held and held == set(backend.cancelled) and not held & set(backend.live)
    assert [env.step(CHAIN)[4] for _ in range(3)] == fresh


def test_close_leaves_the_backend_idle_and_may_be_repeated():
    backend = FakeBackend()
    env = make(backend)
    env.close()
    env.reset(seed=0)
    env.step(CHAIN)
    env.close()
    env.close()
    assert not backend.live and backend.cancelled


def test_the_load_observed_is_the_load_decided_on():
    backend = FakeBackend(places=3)
    env = make(backend, "poisson:8")
    observation, _ = env.reset(seed=0)
    waiting = set()
    for _ in range(40):
        load = backend.loads[-1]
        expected = env._encoder.observe(load)
        assert observation.tolist() == expected.tolist()
        observation, _, _, _, info = env.step(CHAIN)
        assert info["batch"] == load.batch_size >= 1 and info["budget"] == 3 * load.batch_size
        waiting.add(load.waiting)
    assert len(waiting) > 2, "the load never changed: the test shows nothing"


def test_steps_without_decoding_requests_are_not_charged():
    env = make(None, "closed:1", tokens=(2,))  # a prompt step and a decoding step, again and again
    env.reset(seed=0)
    for _ in range(5):
        info = env.step(PLAIN)[4]
        assert info["seconds"] == 1 / 16 and info["tokens"] == 1.0
    assert len(env._server._backend.loads) == 12  # one more of each under way


def test_idle_time_passes_and_is_not_charged():
    backend = FakeBackend()
    env = make(backend, Workload("rare", (Phase(1000.0, rate=0.01),)), tokens=(4,))
    env.reset(seed=0)
    infos = [env.step(PLAIN)[4] for _ in range(9)]
    assert backend.now > 100.0 and {info["seconds"] for info in infos} == {1 / 16}


def test_time_between_calls_does_not_pass_on_the_server():
    class Slow(FakeBackend):
        def clock(self) -> float:
            self.now += 1.0  # every look at the clock, the time that passes outside included
            return self.now

    steady, busy = make(Slow(), "closed:2"), make(Slow(), "closed:2")
    steady.reset(seed=0), busy.reset(seed=0)
    for _ in range(5):
        busy._server._backend.now += 1000.0  # somebody learns
        assert busy.step(CHAIN)[4]["seconds"] == steady.step(CHAIN)[4]["seconds"] < 10.0


def test_time_between_calls_is_not_observed_as_the_servers():
    steady, busy = (make(None, "closed:2", overhead=0.01) for _ in range(2))
    steady.reset(seed=0), busy.reset(seed=0)
    for _ in range(5):
        busy._server._backend.now += 1000.0
        assert np.array_equal(busy.step(CHAIN)[0], steady.step(CHAIN)[0])


def test_the_reward_is_what_the_meter_says():
    env = make(None, "closed:1", tokens=(64,), reward=RewardOptions("relative", rate=0.5))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(PLAIN)
    plain = 0.05 + 0.001
    assert info["plain_seconds"] == pytest.approx(plain) and info["gain"] == 1.0
    assert reward == pytest.approx(1.0 - (1 / 16) / plain)
    speedup = plain / (plain + 0.5 * (1 / 16 - plain))
    _, reward, _, _, info = env.step(CHAIN)
    seconds = 1 / 16 + 3 / 64
    assert reward == pytest.approx(info["tokens"] - speedup * seconds / plain)
    assert (info["depth"], info["width"], info["budget"]) == (3.0, 1.0, 3.0)


def test_episodes_begin_at_the_usual_speed_and_a_seed_forgets_it():
    env = make(None, "closed:1", tokens=(64,), reward=RewardOptions("relative", rate=0.5))
    env.reset(seed=0)
    first = env.step(CHAIN)[1]
    for _ in range(40):
        env.step(CHAIN)
    env.reset()
    assert env.step(CHAIN)[1] != pytest.approx(first, abs=0.05), "the chain's speed is no longer news"
    env.reset(seed=0)
    assert env.step(CHAIN)[1] == first


def test_goodput_counts_the_requests_that_keep_their_pace():
    options = RewardOptions("goodput", slo_tpot=0.08, slo_weight=2.0)
    env = make(None, "closed:1", tokens=(64,), reward=options)
    env.reset(seed=0)
    assert env.step(PLAIN)[4]["penalty"] == 0.0  # 1/16 s for one token
    infos = [env.step(CHAIN)[4] for _ in range(20)]  # 7/64 s for one or four
    assert {(info["tokens"], info["penalty"]) for info in infos} == {(1.0, -2.0), (4.0, 0.0)}


def test_repeated_steps_are_summed_and_their_knobs_averaged():
    one, three = make(None, "closed:2", tokens=(64,)), make(None, "closed:2", tokens=(64,), action_repeat=3)
    one.reset(seed=0), three.reset(seed=0)
    steps = [one.step(CHAIN) for _ in range(3)]
    observation, reward, _, _, info = three.step(CHAIN)
    assert observation.tolist() == steps[-1][0].tolist()
    assert reward == pytest.approx(sum(step[1] for step in steps))
    assert info["tokens"] == sum(step[4]["tokens"] for step in steps) and info["budget"] == 6.0


def test_suites_come_as_the_workload_says():
    backend = FakeBackend()
    env = make(backend, Workload("b only", (Phase(9.0, concurrency=2, suites=("b",)),)))
    env.reset(seed=0)
    assert all(request_id.startswith("b/") for request_id in backend.live)
    with pytest.raises(ConfigError, match="math"):
        make(None, Workload("math", (Phase(9.0, concurrency=2, suites=("math",)),)))


def test_a_failing_backend_is_reported_and_a_reset_recovers():
    backend = FakeBackend()
    env = make(backend)
    env.reset(seed=0)
    backend.fail = ValueError("out of order")
    with pytest.raises(ValueError, match="out of order"):
        env.step(CHAIN)
    with pytest.raises(ConfigError, match="reset"):
        env.step(CHAIN)
    backend.fail = None
    env.reset(seed=0)
    env.step(CHAIN)


def test_a_busy_backend_and_a_step_before_reset_are_refused():
    backend = FakeBackend()
    env = make(backend)
    with pytest.raises(ConfigError, match="reset"):
        env.step(CHAIN)
    backend.add(requests()[0])
    with pytest.raises(ConfigError, match="another run"):
        env.reset()


def test_bad_options_are_refused():
    for bad in ({"horizon": 0}, {"action_repeat": 0}, {"workloads": ()}):
        with pytest.raises(ConfigError):
            SpecEnvOptions(**bad)
    with pytest.raises(ConfigError, match="no requests"):
        SpecEnv(FakeBackend(), FakeSteered(), [], costs())


def test_all_steps_run_in_the_callers_thread():
    backend, before = FakeBackend(), threading.active_count()
    env = make(backend)
    for seed in range(3):
        rollout(env, seed, steps=3)
    assert backend.threads == {threading.get_ident()} and threading.active_count() == before
    gone = weakref.ref(env)
    del env
    gc.collect()
    assert gone() is None


def test_a_reset_recovers_from_an_interrupted_step():
    backend = FakeBackend()
    env = make(backend)
    env.reset(seed=0)
    backend.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        env.step(CHAIN)
    backend.fail = None
    with pytest.raises(ConfigError, match="reset"):
        env.step(CHAIN)
    assert rollout(env, 3) == rollout(make(), 3)


def test_a_closed_environment_is_begun_anew_by_a_reset():
    backend = FakeBackend()
    env = make(backend)
    rollout(env, 0, steps=2)
    env.close()
    with pytest.raises(ConfigError, match="reset"):
        env.step(CHAIN)
    assert not backend.has_work and rollout(env, 3) == rollout(make(), 3)


def test_a_copy_goes_on_by_itself():
    env = make(None, "closed:3", "poisson:3")
    env.reset(seed=0)
    env.step(CHAIN)
    twin = copy.deepcopy(env)
    assert twin._server._backend is not env._server._backend
    steps = [(o.tolist(), *rest) for o, *rest in (env.step(CHAIN) for _ in range(20))]
    assert [(o.tolist(), *rest) for o, *rest in (twin.step(CHAIN) for _ in range(20))] == steps


class Following(BaseController):
    """What the environment is given to steer: the base rules under the plan that was set."""

    name = "following"
    next = AUTOREGRESSIVE

    def steer(self, plan):
        self.next = plan

    def propose(self, load):
        return self.next


def test_the_live_engine_conserves_its_memory_over_resets_interrupts_and_close(tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    engine = tiny.engine(tmp_path, prefill_chunk=16)
    todo = [Request(f"a/{n}", tuple(range(65, 66 + n)), SamplingParams(seed=n, max_new_tokens=24)) for n in range(30)]
    options = SpecEnvOptions(
        workloads=(parse("closed:4"), parse("poisson:50")), table=ActionTable(widths=(1, 2, 4)), gates=((1, 0.01),)
    )
    env = SpecEnv(engine, Following(), todo, costs(), options)
    env.action_space.seed(0)
    speculated = 0.0
    for seed in range(4):
        env.reset(seed=seed)
        engine.check_integrity()
        for _ in range(15):
            speculated += env.step(env.action_space.sample())[4]["budget"]
            engine.check_integrity()
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner.target, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                env.step(CHAIN)
        engine.check_integrity()
    assert speculated and engine.has_work
    env.close()
    engine.check_integrity()
    assert engine.block_manager.used_share == 0.0 and not engine.has_work


def test_the_docstring_lists_every_feature_and_knob():
    text = SpecEnv.__doc__
    rows = [re.findall(r"[^|]+", line) for line in text.splitlines() if re.match(r"\s+\| \d", line)]
    bounds = {}
    for _, entries, _, low, high, *_ in rows:
        first, _, last = entries.strip().partition("-")
        for index in range(int(first), int(last or first) + 1):
            bounds[index] = (float(low), float(high))
    assert bounds == {i: (low, high) for i, (_, low, high) in enumerate(FEATURES)}
    table = ActionTable()
    for values in table.values:
        assert f"| {', '.join(f'{value:g}' for value in values)} |" in text
    assert f"MultiDiscrete({list(table.sizes)})" in text and f"Box({len(FEATURES)},)" in text
