"""Acts between PPO's updates: schedules, scalars for TensorBoard, evaluation, saved states, a progress bar.

An *update* is one rollout and the training on it; they are counted over the whole run, resumes included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress, TaskID
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from echo_rl.controllers.policy.network import Policy
from echo_rl.errors import PolicyError

if TYPE_CHECKING:
    from echo_rl.learning.progress import TrainingProgress

KNOBS = ("nodes", "depth", "width", "gate", "floor")


class UpdateCallback(BaseCallback):
    """A callback that knows the number of updates so far."""

    @property
    def ppo(self) -> PPO:
        assert isinstance(self.model, PPO)
        return self.model

    @property
    def updates(self) -> int:
        return int(self.num_timesteps // (self.ppo.n_steps * self.training_env.num_envs))

    def _on_step(self) -> bool:
        return True


class ScheduleCallback(UpdateCallback):
    """Moves the entropy bonus, and lets the value function alone learn in the first updates."""

    def __init__(self, entropy: tuple[float, float], critic_updates: int) -> None:
        super().__init__()
        self._entropy, self._critic_updates = entropy, critic_updates

    def _on_rollout_end(self) -> None:
        first, last = self._entropy
        done = min(1.0, self.num_timesteps / self.ppo._total_timesteps)
        self.ppo.ent_coef = first + (last - first) * done
        self.logger.record("train/entropy_coefficient", self.ppo.ent_coef)
        policy = self.ppo.policy
        learns = self.updates > self._critic_updates  # this rollout's update counts already
        for part in (policy.mlp_extractor.policy_net, policy.action_net):
            part.requires_grad_(learns)

    def _on_training_end(self) -> None:
        self.ppo.policy.requires_grad_(True)


class TelemetryCallback(UpdateCallback):
    """Logs serving speed, reward terms and the knobs of each rollout, from the environment's `infos`."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, float] = {}
        self._steps = 0

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            self._steps += 1
            for name, value in info.items():
                if isinstance(value, float):
                    self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["reward"] = self._sums.get("reward", 0.0) + float(self.locals["rewards"].sum())
        return True

    def _on_rollout_end(self) -> None:
        sums, count = self._sums, self._steps
        if sums.get("seconds"):
            self.logger.record("serving/tokens_per_second", sums["tokens"] / sums["seconds"])
            self.logger.record("serving/speedup", sums["plain_seconds"] / sums["seconds"])
        for name in sums.keys() - {"tokens", "seconds", "plain_seconds"}:
            self.logger.record(f"mean/{name}", sums[name] / count)
        actions = torch.as_tensor(self.locals["rollout_buffer"].actions).flatten(0, 1)  # [n_steps * num_envs, knobs]
        for knob, choices in zip(KNOBS, actions.T, strict=True):
            self.logger.record(f"choice/{knob}", choices)
        self.logger.record("choice/plain_share", float((actions[:, 0] == 0).float().mean()))
        self._sums, self._steps = {}, 0


class EvaluationCallback(UpdateCallback):
    """Evaluates the policy and keeps the best one; saves the training state. Both also at the very end.

    At the start of a rollout the weights are those of a finished update, so what is saved is whole.
    """

    def __init__(
        self,
        run: TrainingProgress,
        export: Callable[[ActorCriticPolicy], Policy],
        score: Callable[[Policy], Mapping[str, float]],
        keep: Callable[[Policy, Mapping[str, float]], None],
        save: Callable[[], None],
        evaluate_every: int,
        checkpoint_every: int,
    ) -> None:
        super().__init__()
        self._run, self._export, self._score, self._keep, self._save = run, export, score, keep, save
        self._evaluate_every, self._checkpoint_every = evaluate_every, checkpoint_every

    def _on_rollout_start(self) -> None:
        evaluate = self.updates % self._evaluate_every == 0
        if evaluate:
            self._evaluate()
        if evaluate or self.updates % self._checkpoint_every == 0:
            self._save()

    def _on_training_end(self) -> None:
        self._evaluate()
        self._save()

    def _evaluate(self) -> None:
        step = int(self.num_timesteps)
        if any(point["step"] == step for point in self._run.curve):
            return  # a resumed run begins where the last one was evaluated
        policy = self._export(self.ppo.policy)
        if not policy.finite:  # served, ECHO would decide in its stead and get it kept
            raise PolicyError(
                f"after {step} steps the policy's weights are not finite: training diverged; train in a new folder "
                "with a lower learner.lr"
            )
        scores = self._score(policy)
        self._run.curve.append({"step": step, **scores})
        if scores["speedup"] > self._run.best:
            self._run.best = scores["speedup"]
            self._keep(policy, scores)
        for name, value in {**scores, "best": self._run.best}.items():
            self.logger.record(f"held_out/{name}", value)
        self.logger.dump(step)


class ProgressCallback(BaseCallback):
    """Shows how far training is and how it goes."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        super().__init__()
        self._progress, self._task = progress, task

    def _on_step(self) -> bool:
        self._progress.update(self._task, completed=self.num_timesteps)
        return True

    def _on_rollout_end(self) -> None:
        known: dict[str, Any] = self.logger.name_to_value
        words = [
            f"{name.split('/')[1]} {known[name]:.3f}" for name in ("serving/speedup", "mean/reward") if name in known
        ]
        self._progress.update(self._task, description=", ".join(words) or "training")
