"""Runs PPO (Stable-Baselines3) on any `VecEnv` with the codec's spaces, in a folder that a rerun continues.

Knows nothing of traces, workloads or how a policy is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from echo_rl.controllers.policy.network import Activation, Policy
from echo_rl.errors import ConfigError
from echo_rl.learning.callbacks import EvaluationCallback, ProgressCallback, ScheduleCallback, TelemetryCallback
from echo_rl.learning.export import ACTIVATIONS
from echo_rl.learning.progress import TrainingProgress
from echo_rl.utils.files import replacing
from echo_rl.utils.result_store import differing

STATE_FILE = "training_state.pt"
POLICY_FOLDER = "policy"

Score = Callable[[Policy], Mapping[str, float]]
"""Judges a policy by named numbers; the best one has the highest ``speedup``."""


@dataclass(frozen=True)
class LearnerOptions:
    """PPO's settings."""

    steps: int = 900_000
    """Env steps in all, over all environments."""
    lr: tuple[float, float] = (1e-3, 1e-4)
    """Adam's rate at the start and at the end, linear in between."""
    n_steps: int = 64
    """Env steps of each environment between updates."""
    batch_size: int = 256
    """Env steps an optimiser step."""
    n_epochs: int = 6
    """Passes over a rollout."""
    gamma: float = 0.8
    """Discount of an env step. Decisions act on the next few steps, so a short horizon suffices."""
    gae_lambda: float = 0.9
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clipping range of the probability ratio."""
    target_kl: float | None = 0.03
    """Ends an update early where the policy has moved this far; None never does."""
    entropy: tuple[float, float] = (0.02, 0.002)
    """Entropy bonus at the start and at the end, linear in between."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    critic_updates: int = 5
    """First updates in which the value function alone learns, lest an untrained one undoes the cloned policy."""
    net: tuple[int, ...] = (64, 64)
    """Hidden layers, of the policy and of the value function alike."""
    activation: Activation = "tanh"
    """Activation between layers."""
    evaluate_every: int = 20
    """Updates between evaluations; the best policy is kept."""
    checkpoint_every: int = 10
    """Updates between saved training states."""
    threads: int = 1
    """Torch threads while training; one is fastest for nets this small."""
    seed: int = 0
    """The seed of the weights, the drawn actions and the environments."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.n_steps, self.n_epochs, self.evaluate_every, self.checkpoint_every, self.threads)
        if min(counts) < 1 or self.batch_size < 2 or self.critic_updates < 0 or not 0 <= self.seed < 2**31:
            raise ConfigError(
                "training needs steps, n_steps, n_epochs, evaluate_every, checkpoint_every and threads >= 1, "
                "batch_size >= 2, critic_updates >= 0 and a seed from 0 to 2**31 - 1"
            )
        if not (0.0 <= self.gamma < 1.0 and 0.0 <= self.gae_lambda <= 1.0 and self.clip > 0.0):
            raise ConfigError("training needs gamma in [0, 1), gae_lambda in [0, 1] and clip > 0")
        weights = (*self.lr, *self.entropy, self.value_weight)
        if not all(0.0 <= weight < math.inf for weight in weights) or max(self.lr) <= 0.0:
            raise ConfigError("lr and entropy are (start, end), none below 0; value_weight is at least 0; all finite")
        if self.target_kl is not None and not self.target_kl > 0.0:
            raise ConfigError(f"target_kl is {self.target_kl}; give a positive number, or None for no limit")
        if any(width < 1 for width in self.net) or self.activation not in ACTIVATIONS:
            raise ConfigError(f"net is {self.net}, activation {self.activation!r}; give widths >= 1, tanh or relu")


def build(options: LearnerOptions, env: VecEnv, done: int = 0) -> PPO:
    """The untrained learner; `done` env steps of an interrupted run change its seed, so that nothing repeats."""
    first, last = options.lr
    return PPO(
        "MlpPolicy", env,
        learning_rate=lambda left: last + (first - last) * left,
        n_steps=options.n_steps, batch_size=min(options.batch_size, options.n_steps * env.num_envs),
        n_epochs=options.n_epochs, gamma=options.gamma, gae_lambda=options.gae_lambda, clip_range=options.clip,
        target_kl=options.target_kl, ent_coef=options.entropy[0], vf_coef=options.value_weight,
        policy_kwargs={"net_arch": list(options.net), "activation_fn": ACTIVATIONS[options.activation]},
        seed=options.seed + done, device="cpu",
    )  # fmt: skip


def fit(
    options: LearnerOptions,
    env: VecEnv,
    out: Path,
    export: Callable[[ActorCriticPolicy], Policy],
    score: Score,
    start: Callable[[ActorCriticPolicy], Mapping[str, Any]] = lambda policy: {},
    claim: Mapping[str, Any] | None = None,
    manifest: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda facts: facts,
    console: Console | None = None,
) -> tuple[PPO, TrainingProgress]:
    """Train in `out`, or go on from the state in it: to `options.steps`, keeping the policy that scores best.

    `start` prepares a new policy (cloning) and returns notes to keep; `claim` names what the run is
    about (plain JSON): a folder of another run is refused with `ConfigError`. `manifest` turns
    ``metrics``, ``steps`` and ``notes`` into what the policy's manifest tells. An interrupt loses what came
    after the last state; a resumed run draws other random numbers than an uninterrupted one.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, claimed = out / STATE_FILE, dict(claim or {})
    with torch_threads(options.threads):
        state = read_state(path, claimed)
        done = int(state["steps"]) if state else 0
        model = build(options, env, done)
        model.set_logger(configure(str(out / "tensorboard"), ["tensorboard"]))
        run = _restore(model, state) if state else TrainingProgress(notes=dict(start(model.policy)))

        def keep(policy: Policy, scores: Mapping[str, float]) -> None:
            facts = {"metrics": dict(scores), "steps": model.num_timesteps, "notes": run.notes}
            policy.save(out / POLICY_FOLDER, manifest(facts))

        keeper = EvaluationCallback(
            run, export, score, keep, lambda: write_state(path, model, run, claimed),
            options.evaluate_every, options.checkpoint_every,
        )  # fmt: skip
        if done < options.steps:
            schedule = ScheduleCallback(options.entropy, options.critic_updates)
            _learn(model, options.steps, [schedule, TelemetryCallback(), keeper], console)
    return model, run


def write_state(path: Path, model: PPO, run: TrainingProgress, claim: Mapping[str, Any]) -> None:
    """Write the state beside the old one, then in its place: an interrupt leaves one of the two whole."""
    state = {
        "claim": dict(claim), "policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict(),
        "steps": model.num_timesteps, "curve": run.curve, "best": run.best, "notes": run.notes,
    }  # fmt: skip
    with replacing(path) as part:
        torch.save(state, part)


def read_state(path: Path, claim: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of an earlier run, None where there is none. Raises `ConfigError` on another run's or a damaged one."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        theirs = state["claim"]
    except Exception as error:  # torch.load promises no particular one
        raise ConfigError(f"{path} is damaged; delete it to begin anew") from error
    changed = sorted(differing(theirs, claim))
    if changed:
        raise ConfigError(f"{path} was trained with another {', '.join(changed)}; use another out folder")
    return state


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch work with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _restore(model: PPO, state: Mapping[str, Any]) -> TrainingProgress:
    model.policy.load_state_dict(state["policy"])
    model.policy.optimizer.load_state_dict(state["optimizer"])
    model.num_timesteps = int(state["steps"])
    return TrainingProgress(state["curve"], state["best"], state["notes"])


def _learn(model: PPO, steps: int, callbacks: list[BaseCallback], console: Console | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("training", total=steps, completed=model.num_timesteps)
        left = steps - model.num_timesteps  # Stable-Baselines3 adds what has been done
        model.learn(
            left, callback=[*callbacks, ProgressCallback(progress, task)], reset_num_timesteps=False, log_interval=1
        )
