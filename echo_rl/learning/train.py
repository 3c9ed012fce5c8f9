"""Trains a policy on replayed servers: clone ECHO, then PPO, keep what serves unseen responses fastest.

``train(config)`` writes a folder: ``policy/`` (the best policy, which ``make("ppo", path=...)`` serves),
``training_state.pt`` and ``tensorboard/``. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from echo_rl.codec import ActionTable, visible
from echo_rl.contracts import Gates
from echo_rl.controllers.echo.echo import Echo, EchoOptions
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.policy.network import Policy, bound
from echo_rl.controllers.policy.ppo import Ppo, PpoOptions
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.env.reward import RewardOptions
from echo_rl.env.vector_env import REFERENCE, ReplayEnvOptions, ReplayVectorEnv
from echo_rl.errors import ConfigError
from echo_rl.learning.clone import CloneOptions, Demonstrations, Scene, clone, demonstrate
from echo_rl.learning.export import commit, export_policy
from echo_rl.learning.learner import POLICY_FOLDER, LearnerOptions, Score, fit
from echo_rl.learning.play import HeldOut, MakeController, World
from echo_rl.learning.sb3_env import Sb3VecEnv
from echo_rl.replay.machines import another
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import digest_of
from echo_rl.workloads.arrivals import facts, parse
from echo_rl.workloads.datasets import refuse_held_out

CLOSED = tuple(f"closed:{c}" for c in (1, 2, 4, 8, 16, 32))
OTHERS_SHOWN, OTHERS_JUDGED = 3, 2
"""Other machines in the demonstrations and in the evaluation."""
FREE = ("out", "learner.steps", "learner.evaluate_every", "learner.checkpoint_every", "learner.threads")
"""Settings that a resumed run may change."""
FILES = ("trace", "profile", "calibration")
"""Settings that name files; a run is identified by what is in them."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a policy's training."""

    out: Path = Path("runs/ppo")
    """Folder of the policy, of the training state and of the TensorBoard events."""
    trace: Path | None = None
    """Recorded responses; None takes the packaged trace."""
    profile: Path | None = None
    """The machine's costs; None takes this machine's own, else the packaged ones."""
    calibration: Path | None = None
    """The drafter's gates; None takes this machine's own, else the packaged ones."""
    workloads: tuple[str, ...] = (*CLOSED, "poisson:1", "bursty:0.5,4,5,5")
    """Workloads that the servers serve, drawn anew for each episode; see `arrivals.parse`."""
    lanes: int = 32
    """Servers side by side."""
    horizon: int = 64
    """Env steps an episode."""
    repeat: int = 4
    """Serving steps for which a decision stands, in training and in serving."""
    randomise: float = 0.5
    """Share of the episodes on another machine than the profile says (see `machines.another`); above 0, cloning and
    evaluation see others too. For a policy that transfers, also to this machine in another hour. At 0 the profile is
    always right."""
    noise: bool = False
    """Train under noisy step times. Without, rewards are exact and differ by what was decided alone."""
    reference: bool = True
    """Take the reward of a fixed plan on the same forests off each step's, see `ReplayEnvOptions.reference`."""
    hidden: tuple[str, ...] = ()
    """Groups of observations (load, speculation, cost) that the policy never sees: for ablations."""
    held_out: float = 0.3
    """Share of the prompts that training never sees: those that `echo-rl eval` and `echo-rl ab` serve. 0: none."""
    selection: float = 0.3
    """Share of the others that only the evaluation sees, which chooses the policy to keep."""
    evaluate_on: tuple[str, ...] = CLOSED
    """Workloads of the evaluation."""
    evaluation_steps: int = 300
    """Serving steps a workload and evaluation."""
    seed: int = 0
    """The seed of the demonstrations and the evaluation; the learner has its own."""
    reward: RewardOptions = field(default_factory=RewardOptions)
    clone: CloneOptions = field(default_factory=CloneOptions)
    learner: LearnerOptions = field(default_factory=LearnerOptions)

    def __post_init__(self) -> None:
        if min(self.lanes, self.horizon, self.repeat, self.evaluation_steps) < 1:
            raise ConfigError("training needs lanes, horizon, repeat and evaluation_steps of at least 1")
        if self.lanes * self.learner.n_steps < 2:
            raise ConfigError("training needs two env steps an update; raise lanes or learner.n_steps")
        if not self.workloads or not self.evaluate_on:
            raise ConfigError("training needs at least one workload to serve and one to evaluate on")
        for text in (*self.workloads, *self.evaluate_on):
            parse(text)
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}; give a whole number from 0 to 2**31 - 1")
        visible(self.hidden)


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    policy: Path
    """Folder of the best policy."""
    steps: int
    machine: str
    """The machine whose costs it was trained on; a modelled machine is called so."""
    curve: tuple[Mapping[str, float], ...]
    """Scores on held-out responses, one evaluation each."""

    @property
    def best(self) -> Mapping[str, float]:
        return max(self.curve, key=lambda point: point["speedup"])


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that a config names, loaded. Raises `ConfigError`, `HeldOutError` and `TraceError`."""

    profile: CostProfile
    calibration: GateCalibration
    training: Trace
    selection: Trace
    table: ActionTable

    @classmethod
    def load(cls, config: TrainConfig) -> TrainingInputs:
        trace = Trace.of(config.trace)
        refuse_held_out(trace.suites, "train")
        seen = trace.split(config.held_out)[0]
        table = ActionTable()
        trace.require(max(table.depths), max(table.widths))
        return cls(
            CostProfile.of(config.profile),
            GateCalibration.of(config.calibration),
            *seen.split(config.selection),
            table,
        )

    @property
    def costs(self) -> BatchedCostProfile:
        return BatchedCostProfile(self.profile)

    def worlds(self, trace: Trace, others: int) -> list[World]:
        """Replays of a trace on the profile's machine and on so many others, always the same ones."""
        machines = [another(self.profile, np.random.default_rng(number)) for number in range(others)]
        return [World(trace, BatchedCostProfile(machine)) for machine in (self.profile, *machines)]

    @property
    def gates(self) -> Gates:
        return self.calibration.sparse(max(self.table.depths))

    def echo(self) -> Echo:
        return Echo(EchoOptions(self.profile, self.calibration))


def train(
    config: TrainConfig, console: Console | None = None, baselines: Mapping[str, MakeController] | None = None
) -> Trained:
    """Train, or go on in `config.out`. `baselines` are controllers to be compared with; None: ECHO.

    Raises `ConfigError` (a setting, or the folder of another run) and `TraceError`.
    """
    inputs = TrainingInputs.load(config)
    for text in config.evaluate_on:
        parse(text).check(inputs.selection.suites)
    against = {"echo": inputs.echo} if baselines is None else baselines
    env = make_env(config, inputs)
    try:
        model, run = fit(
            config.learner,
            env,
            config.out,
            export=lambda policy: export_policy(policy, inputs.table, config.repeat, config.hidden),
            score=make_score(config, inputs, against),
            start=lambda policy: _clone_echo(policy, config, inputs),
            claim=claim(config, inputs),
            manifest=lambda facts: _manifest(config, inputs, facts),
            console=console,
        )
    finally:
        env.close()
    return Trained(config.out / POLICY_FOLDER, int(model.num_timesteps), inputs.profile.title, tuple(run.curve))


def make_env(config: TrainConfig, inputs: TrainingInputs) -> VecEnv:
    """The environments to learn on."""
    options = ReplayEnvOptions(
        workloads=tuple(map(parse, config.workloads)), table=inputs.table, reward=config.reward,
        horizon=config.horizon, action_repeat=config.repeat, randomise=config.randomise, hidden=config.hidden,
        gates=inputs.gates, score_power=inputs.calibration.score_power, noise=config.noise,
        reference=REFERENCE if config.reference else (), shared=True, stagger=True,
    )  # fmt: skip
    env = ReplayVectorEnv(inputs.training, inputs.costs, options, config.lanes)
    return VecMonitor(Sb3VecEnv(env, config.learner.seed))


def make_score(config: TrainConfig, inputs: TrainingInputs, baselines: Mapping[str, MakeController]) -> Score:
    """The evaluation on responses that were not trained on, as the policy would be served."""
    worlds = inputs.worlds(inputs.selection, OTHERS_JUDGED if config.randomise else 0)

    def serve(policy: Policy) -> Ppo:
        return Ppo(PpoOptions(policy, inputs.profile, inputs.calibration))

    return HeldOut(worlds, serve, config.evaluate_on, config.evaluation_steps, config.seed, baselines)


def claim(config: TrainConfig, inputs: TrainingInputs) -> dict[str, Any]:
    """Everything that tells this run from others, as JSON."""
    arrivals = facts(map(parse, (*config.workloads, *config.evaluate_on)))
    return {**_provenance(inputs), **bound(inputs.table), **_settings(config), **arrivals}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, files aside."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(asdict(config), default=str)).items():
        nested = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: inner for key, inner in nested.items() if key not in (*FREE, *FILES)}
    return flat


def _provenance(inputs: TrainingInputs) -> dict[str, str]:
    """The sources of the data, under the names of their files in the config."""
    trace, profile, calibration = inputs.training, inputs.profile, inputs.calibration
    described = (
        f"{trace.provenance} [{trace.digest}]",
        f"{profile.provenance} [{digest_of(repr(profile).encode())}]",
        f"{calibration.provenance} [{digest_of(repr(calibration).encode())}]",
    )
    return dict(zip(FILES, described, strict=True))


def _clone_echo(policy: ActorCriticPolicy, config: TrainConfig, inputs: TrainingInputs) -> dict[str, Any]:
    """Clone ECHO into the policy; returns notes on what of it was learned."""
    if not config.clone.steps:
        return {}
    worlds = inputs.worlds(inputs.training, OTHERS_SHOWN if config.randomise else 0)
    scene = Scene(worlds, inputs.profile, inputs.table, inputs.gates, config.workloads, config.repeat, config.horizon)
    shown = demonstrate(scene, inputs.echo, config.clone, config.seed)
    seen = Demonstrations(shown.observations * visible(config.hidden), shown.actions)
    agreed = clone(policy, seen, config.clone, config.seed)
    return {"demonstrations": len(seen.actions), "agreement": [round(share, 4) for share in agreed]}


def _manifest(config: TrainConfig, inputs: TrainingInputs, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a policy's manifest that tell of its training."""
    trained = {
        **_provenance(inputs), "modelled": inputs.profile.modelled, "steps": facts["steps"],
        "cloned": facts["notes"], "config": _settings(config),
    }  # fmt: skip
    return {"trained": trained, "metrics": facts["metrics"], "commit": commit()}
