"""The fleet as a Stable-Baselines3 `VecEnv`: what `echo-rl train` learns on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from echo_rl.codec import ActionTable, BatchedObservationEncoder, visible
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.env.reward import RewardMeter, RewardOptions
from echo_rl.env.spec_env import observation_space
from echo_rl.errors import ConfigError
from echo_rl.replay.machines import another
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.replay.vector import Gates, Plans, VectorReplay, VectorReplayStep
from echo_rl.workloads.arrivals import Workload, parse


@dataclass(frozen=True)
class ReplayVecEnvOptions:
    """What every lane serves, and how an env step is cut out of its serving steps."""

    workloads: tuple[str, ...] = tuple(f"closed:{c}" for c in (1, 2, 4, 8, 16, 32))
    """Drawn anew each episode, see `workload.parse`."""
    table: ActionTable = field(default_factory=ActionTable)
    reward: RewardOptions = field(default_factory=RewardOptions)
    horizon: int = 64
    """Env steps an episode."""
    repeat: int = 4
    """Serving steps under one action."""
    randomise: float = 0.0
    """Share of the episodes on another machine than the profile's, see `machines.another`. Observations start out from
    the profile's costs all the same, as where it is stale or the machine has a slow spell."""
    reference: Plans = ((2, (5.0, 4, 3)), (8, (2.0, 3, 2)), (64, (1.0, 1, 1)))
    """Plans, by batch size, whose reward on the same forests is taken off each step's: a control variate that
    takes the luck of a step out of the reward. At one position it changes no plan's rank; over an episode it favours
    large trees a little, since these leave harder positions behind, where the reference gets less (by 1 to 4 % between
    no tree and a large one). Cut to what the trace holds. Empty for the plain reward; only in the forms ``relative``
    and ``goodput``."""
    hidden: tuple[str, ...] = ()
    """Groups of observations (`codec.GROUPS`) shown as zeros: for ablations."""
    noise: bool = True
    """Noisy step times."""
    gates: Gates = ()
    """The calibrated sparse thresholds, (depth, tau)."""
    score_power: tuple[float, ...] = ()
    """Calibration of path probabilities, see `GateCalibration.score_power`."""
    limits: ReplaySchedulerOptions = field(default_factory=ReplaySchedulerOptions)

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.repeat < 1 or not self.workloads:
            raise ConfigError("a fleet needs horizon >= 1, repeat >= 1 and at least one workload")
        if not 0 <= self.randomise <= 1:
            raise ConfigError(f"randomise is {self.randomise}; it is a share of the episodes, in [0, 1]")
        visible(self.hidden)


class ReplayVecEnv(VecEnv):
    """E lanes of `EchoRL/Replay-v0` in one process. Episodes only truncate, staggered at the start.

    Equal seeds give equal transitions, whatever happens between them. `infos` hold the sums over the
    repeated serving steps: tokens, seconds, plain_seconds (of plain serving
    that they replace, see `timing.Plain`), batch, budget, depth, width and the reward's named terms.
    """

    render_mode = None

    def __init__(
        self, trace: Trace, costs: BatchedCostProfile, options: ReplayVecEnvOptions, lanes: int, seed: int = 0
    ) -> None:
        super().__init__(lanes, observation_space(), gym.spaces.MultiDiscrete(np.array(options.table.sizes)))
        self.options, self._costs = options, costs
        self._machines = BatchedCostProfile(costs.profile, lanes) if options.randomise else costs
        self._workloads: list[Workload] = [parse(text) for text in options.workloads]
        for workload in self._workloads:
            workload.check(trace.suites)
        most, widest = trace.max_depth, trace.max_width
        trace.require(max(options.table.depths), max(options.table.widths))
        plans = options.reference if options.reward.form in ("relative", "goodput") else ()
        reference = tuple((size, (n, min(depth, most), min(width, widest))) for size, (n, depth, width) in plans)
        self._fleet = VectorReplay(
            trace,
            self._machines,
            sorted({*options.table.widths, *(width for _, (_, _, width) in reference)}),
            options.gates,
            options.score_power,
            lanes,
            options.limits,
            options.noise,
            reference,
        )
        self._visible = visible(options.hidden)
        self._actions = np.zeros((lanes, len(options.table.sizes)), dtype=np.int64)
        self._start(seed)

    def reset(self) -> NDArray[np.float32]:
        """Begin all episodes; the first ones of different lanes end at different times."""
        if self._seeds[0] is not None:
            self._start(int(self._seeds[0]))
            self._reset_seeds()
        for lane in range(self.num_envs):
            self._begin(lane)
        self._steps[:] = self._skipped[:] = self._generator.integers(0, self.options.horizon, self.num_envs)
        return self._observe()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        knobs = self.options.table.knobs(self._actions)
        sums: dict[str, NDArray[np.float64]] = {}
        for _ in range(self.options.repeat):
            result = self._fleet.step(knobs)
            for name, values in self._score(result).items():
                sums[name] = sums[name] + values if name in sums else values
        self._steps += 1
        rewards = sums.pop("reward")
        self._returns += rewards
        infos = [self._info(lane, sums) for lane in range(self.num_envs)]
        observations = self._observe()
        done = self._steps >= self.options.horizon
        for lane in np.flatnonzero(done):
            infos[lane] |= self._ended(int(lane), observations[lane])
            self._begin(int(lane))
        if done.any():
            observations = self._observe()
        return observations, rewards.astype(np.float32), done, infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise ConfigError("a replay's settings are fixed; build another one")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def _start(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._tracker = BatchedObservationEncoder(self._costs, self.num_envs)
        self._meter = RewardMeter(self.options.reward, self.num_envs)
        self._steps, self._skipped = np.zeros((2, self.num_envs), dtype=np.int64)  # of the first episodes
        self._returns = np.zeros(self.num_envs)

    def _begin(self, lane: int) -> None:
        """A new episode: another workload, perhaps another machine, nothing known."""
        workload = self._workloads[int(self._generator.integers(len(self._workloads)))]
        if self.options.randomise:
            home, elsewhere = self._costs.profile, self._generator.random() < self.options.randomise
            self._machines.put(lane, another(home, self._generator) if elsewhere else home)
        mask = np.arange(self.num_envs) == lane
        self._tracker.reset(mask)
        self._meter.reset(mask)
        self._fleet.reset(lane, workload, int(self._generator.integers(2**31)))
        self._steps[lane], self._skipped[lane], self._returns[lane] = 0, 0, 0.0

    def _score(self, step: VectorReplayStep) -> dict[str, NDArray[np.float64]]:
        """The reward's terms and the step's facts; the tracker learns from the step."""
        o, slo = step.outcomes, self.options.reward.slo_tpot
        self._tracker.update(o)
        good = step.within(slo) if self.options.reward.form == "goodput" else None
        batch, baseline = o.loads.batch, np.zeros(self.num_envs)
        if step.reference is not None:
            self._meter.begin(batch > 0, step.plain.decode, batch)
            spent = (step.reference.seconds - step.plain.prompts) / step.plain.decode
            baseline = step.reference.decoded / batch - self._meter.speedup * spent
        terms = self._meter.score(step.decoded, step.plain.besides(step.seconds), step.plain.decode, batch, good)
        terms = terms | {"reference": -baseline, "reward": terms["reward"] - baseline}
        worth = step.plain.worth(step.decoded, batch)
        facts = {"tokens": step.tokens, "seconds": step.seconds, "plain_seconds": worth, "batch": batch}
        return terms | facts | {"budget": o.budget, "depth": o.depth, "width": o.width}

    def _info(self, lane: int, sums: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
        info: dict[str, Any] = {name: float(values[lane]) for name, values in sums.items()}
        for name in ("batch", "budget", "depth", "width"):
            info[name] /= self.options.repeat
        return info

    def _ended(self, lane: int, last: NDArray[np.float32]) -> dict[str, Any]:
        taken = int(self._steps[lane] - self._skipped[lane])
        episode = {"r": float(self._returns[lane]), "l": taken, "t": float(self._fleet.now[lane])}
        return {"TimeLimit.truncated": True, "terminal_observation": last, "episode": episode}

    def _observe(self) -> NDArray[np.float32]:
        return self._tracker.observe(self._fleet.loads()) * self._visible
