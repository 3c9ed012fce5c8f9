"""The control problem over many replayed servers at once, as a Gymnasium `VectorEnv`: what policies are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from echo_rl.codec import BatchedObservationEncoder, Knobs, visible
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.env.options import (
    MEANS,
    SpecEnvOptions,
    action_space,
    checked,
    observation_space,
    refuse_rendering,
)
from echo_rl.env.reward import RewardMeter
from echo_rl.errors import ConfigError
from echo_rl.replay.machines import another
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.replay.vector import Plans, VectorReplay, VectorReplayStep

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
REFERENCE: Plans = ((2, (5.0, 4, 3)), (8, (2.0, 3, 2)), (64, (1.0, 1, 1)))
"""The plans, by batch size, that training compares with, see `ReplayEnvOptions.reference`."""


@dataclass(frozen=True)
class ReplayEnvOptions(SpecEnvOptions):
    """`SpecEnvOptions` and what only a replay can do. Raises `ConfigError`."""

    noise: bool = True
    """Draw step times around the profile's, with its measured residual noise."""
    score_power: tuple[float, ...] = ()
    """Calibration of path probabilities, see `GateCalibration.score_power`."""
    randomise: float = 0.0
    """Share of the episodes on another machine than the profile's, see `machines.another`. Observations start out from
    the profile's costs all the same, as where it is stale or the machine has a slow spell."""
    reference: Plans = ()
    """Plans, by batch size, whose reward on the same forests is taken off each step's (see `REFERENCE`): a control
    variate that takes the luck of a step out of the reward. At one position it changes no plan's rank; over an episode
    it favours large trees a little, since these leave harder positions behind, where the reference gets less (by 1 to
    4 % between no tree and a large one). Cut to what the trace holds. Empty for the plain reward; used in the forms
    ``relative`` and ``goodput`` alone."""
    hidden: tuple[str, ...] = ()
    """Groups of observations (`codec.GROUPS`) shown as zeros: for ablations."""
    limits: ReplaySchedulerOptions = field(default_factory=ReplaySchedulerOptions)
    """The live engine's limits."""
    shared: bool = False
    """Draw everything from one generator, and learn the reward's usual speeds from all environments together, as
    training does. Otherwise environment i of seed s is the single environment of seed s + i."""
    stagger: bool = False
    """End the first episodes at different times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.randomise <= 1:
            raise ConfigError(f"randomise is {self.randomise}; it is a share of the episodes, in [0, 1]")
        visible(self.hidden)


class ReplayVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """`num_envs` environments ``EchoRL/Replay-v0``, stepped together; `SpecEnv` specifies what each of them is.

    Equal seeds give equal transitions, whatever happens between them. Episodes only truncate. `metadata` tells how the
    next one begins: by default in the same step (``AutoresetMode.SAME_STEP``): the observation and the info are the
    new episode's, and the old one's are in ``infos["final_obs"]`` and ``infos["final_info"]``; with ``DISABLED``
    `reset` begins it, for the environments that ``options["reset_mask"]`` ([num_envs], bool) names.

    Infos are arrays by name, each with a mask ``_name`` of the environments that have it, as `SyncVectorEnv`'s are.
    Beside `SpecEnv`'s there is ``reference``, the reward taken off for the reference plan, where the options name one.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # type: ignore[misc]

    def __init__(
        self,
        trace: Trace,
        costs: BatchedCostProfile,
        options: ReplayEnvOptions | None = None,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Raises `ConfigError` where a workload names a suite that the trace lacks, `TraceError` where the action table
        drafts more than was recorded, and Gymnasium's `UnsupportedMode` on any render mode."""
        refuse_rendering(render_mode)
        self.options, self.num_envs, self._costs = options or ReplayEnvOptions(), num_envs, costs
        self.metadata = self.metadata | {"autoreset_mode": _autoreset(autoreset_mode)}  # type: ignore[misc]
        table = self.options.table
        self.single_observation_space, self.single_action_space = observation_space(), action_space(table)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        for workload in self.options.workloads:
            workload.check(trace.suites)
        trace.require(max(table.depths), max(table.widths))
        self._machines = BatchedCostProfile(costs.profile, num_envs) if self.options.randomise else costs
        self._replay = _vector_replay(trace, self._machines, self.options, num_envs)
        self._visible = visible(self.options.hidden)
        self._encoder = BatchedObservationEncoder(costs, num_envs)
        self._meter = RewardMeter(self.options.reward, num_envs, self.options.shared)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._begun = False
        begun = [np_random()] * num_envs if self.options.shared else [np_random() for _ in range(num_envs)]
        self._generators, self._seeds = [generator for generator, _ in begun], [seed for _, seed in begun]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generators of the environments: the same one for all if they are shared."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds of these generators."""
        return tuple(self._seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin episodes, everywhere or where ``options["reset_mask"]`` says so.

        `seed` is one for each environment, or the first of as many in a row; None goes on with the generators as they
        are. Raises `ConfigError` on a mask or seeds of another shape.
        """
        chosen = _reset_mask(options, self.num_envs)
        seeds = [None] * self.num_envs if seed is None else _seeds(seed, self.num_envs)
        self._seed([one if mine else None for one, mine in zip(seeds, chosen, strict=True)])
        infos = self._begin_all(chosen, {})
        for index in np.flatnonzero(chosen & self.options.stagger).tolist():
            self._steps[index] = self._generators[index].integers(0, self.options.horizon)
        self._begun = True
        return self._observe(), infos

    def step(self, actions: ArrayLike) -> tuple[NDArray[np.float32], Floats, Bools, Bools, dict[str, Any]]:
        """Serve `action_repeat` steps in every environment.

        Raises `ConfigError`, and changes nothing, on actions that are not in the action space and before any reset.
        """
        knobs = self.options.table.knobs(checked(actions, self.action_space))
        if not self._begun:
            raise ConfigError("the environments have no step to decide on; call reset() first")
        facts = self._serve(knobs)
        rewards = facts.pop("reward")
        self._steps += 1
        truncated = self._steps >= self.options.horizon
        observations = self._observe()
        again = truncated & (self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP)
        infos = _masked(facts, ~again)
        if again.any():
            infos = self._begin_all(again, infos | _final(observations, facts, again))
            observations = self._observe()
        return observations, rewards, np.zeros_like(truncated), truncated, infos

    def _seed(self, seeds: Sequence[int | None]) -> None:
        """Begin generators anew where a seed is given, and what was learned of usual speeds there."""
        given = [index for index, seed in enumerate(seeds) if seed is not None]
        for index in given[:1] if self.options.shared else given:
            everywhere = slice(None) if self.options.shared else slice(index, index + 1)
            generator, seed = np_random(seeds[index])
            self._generators[everywhere] = [generator] * len(self._generators[everywhere])
            self._seeds[everywhere] = [seed] * len(self._seeds[everywhere])
        if given:
            self._meter.forget(np.isin(np.arange(self.num_envs), given))

    def _begin_all(self, chosen: Bools, infos: dict[str, Any]) -> dict[str, Any]:
        """New episodes in these environments; the infos with theirs."""
        for index in np.flatnonzero(chosen).tolist():
            infos = self._add_info(infos, self._begin(index), index)
        return infos

    def _begin(self, index: int) -> dict[str, Any]:
        """A new episode: another workload, perhaps another machine, nothing known. Its info."""
        generator, workloads = self._generators[index], self.options.workloads
        workload = workloads[int(generator.integers(len(workloads)))]
        if self.options.randomise:
            home, elsewhere = self._costs.profile, generator.random() < self.options.randomise
            self._machines.put(index, another(home, generator) if elsewhere else home)
        chosen = np.arange(self.num_envs) == index
        self._encoder.reset(chosen)
        self._meter.reset(chosen)
        self._replay.reset(index, workload, int(generator.integers(2**31)))
        self._steps[index] = 0
        return {"workload": workload.name}

    def _serve(self, knobs: Knobs) -> dict[str, Floats]:
        """The reward, its terms and the facts of the serving steps under one action."""
        totals = self._judge(self._replay.step(knobs))
        for _ in range(self.options.action_repeat - 1):
            for name, values in self._judge(self._replay.step(knobs)).items():
                totals[name] = totals[name] + values
        return totals | {name: totals[name] / self.options.action_repeat for name in MEANS}

    def _judge(self, step: VectorReplayStep) -> dict[str, Floats]:
        """The reward, its terms and the facts of one serving step, from which the observations learn."""
        outcome, plain = step.outcomes, step.plain
        self._encoder.update(outcome)
        good = step.within(self.options.reward.slo_tpot) if self.options.reward.form == "goodput" else None
        batch = outcome.loads.batch
        baseline = self._baseline(step)
        terms = self._meter.score(step.decoded, plain.besides(step.seconds), plain.decode, batch, good)
        if baseline is not None:
            terms |= {"reference": -baseline, "reward": terms["reward"] - baseline}
        worth = plain.worth(step.decoded, batch)
        facts = {"tokens": step.tokens, "seconds": step.seconds, "plain_seconds": worth, "batch": batch}
        return terms | facts | {"budget": outcome.budget, "depth": outcome.depth, "width": outcome.width}

    def _baseline(self, step: VectorReplayStep) -> Floats | None:
        """[E] what the reference plan would have been rewarded, if there is one."""
        if step.reference is None:
            return None
        batch, plain = step.outcomes.loads.batch, step.plain
        self._meter.begin(batch > 0, plain.decode, batch)
        spent = (step.reference.seconds - plain.prompts) / plain.decode
        baseline: Floats = step.reference.decoded / batch - self._meter.speedup * spent
        return baseline

    def _observe(self) -> NDArray[np.float32]:
        return self._encoder.observe(self._replay.loads()) * self._visible


def _vector_replay(trace: Trace, costs: BatchedCostProfile, options: ReplayEnvOptions, num_envs: int) -> VectorReplay:
    """The servers, with the forests of all widths that the table or the reference may ask for."""
    plans = options.reference if options.reward.form in ("relative", "goodput") else ()
    deepest, widest = trace.max_depth, trace.max_width
    reference = tuple((size, (n, min(depth, deepest), min(width, widest))) for size, (n, depth, width) in plans)
    widths = sorted({*options.table.widths, *(width for _, (_, _, width) in reference)})
    known = options.gates, options.score_power
    return VectorReplay(trace, costs, widths, *known, num_envs, options.limits, options.noise, reference)


def _autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    chosen = AutoresetMode(mode)
    if chosen == AutoresetMode.NEXT_STEP:
        raise ConfigError("replayed servers are stepped all together; give autoreset_mode SameStep or Disabled")
    return chosen


def _seeds(seed: int | Sequence[int | None], count: int) -> list[int | None]:
    seeds: list[int | None] = (
        [int(seed) + index for index in range(count)] if isinstance(seed, int | np.integer) else list(seed)
    )
    if len(seeds) != count:
        raise ConfigError(f"reset was given {len(seeds)} seeds for {count} environments; give one each, or a first one")
    return seeds


def _reset_mask(options: dict[str, Any] | None, count: int) -> Bools:
    """[E] which environments to reset."""
    mask: Bools = np.asarray((options or {}).get("reset_mask", np.ones(count, dtype=np.bool_)))
    if mask.shape != (count,) or mask.dtype != np.bool_ or not mask.any():
        raise ConfigError(f"options['reset_mask'] must be {count} truth values, at least one of them true")
    return mask


def _masked(facts: dict[str, Floats], present: Bools) -> dict[str, Any]:
    """The facts and their masks, of the environments where they are present; nothing if they are nowhere."""
    if present.all():
        return {**facts, **{f"_{name}": present.copy() for name in facts}}
    kept = {name: np.where(present, values, 0.0) for name, values in facts.items()} if present.any() else {}
    return {**kept, **{f"_{name}": present.copy() for name in kept}}


def _final(observations: NDArray[np.float32], facts: dict[str, Floats], over: Bools) -> dict[str, Any]:
    """The last observations and infos of the episodes that are over."""
    last = np.full(len(over), None, dtype=object)
    for index in np.flatnonzero(over).tolist():
        last[index] = observations[index]
    return {
        "final_obs": last,
        "_final_obs": over.copy(),
        "final_info": _masked(facts, over),
        "_final_info": over.copy(),
    }
