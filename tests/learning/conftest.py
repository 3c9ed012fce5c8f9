"""A guessing game with the codec's spaces: the first knob must name the target that an observation shows."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from echo_rl.codec import FEATURES, ActionTable
from echo_rl.controllers.policy.network import Policy

FIRST, TARGETS = 6, 8
"""The target is shown one-hot in these features (the acceptances)."""


def shown(targets: np.ndarray) -> np.ndarray:
    """[E] targets -> [E, F] observations."""
    observations = np.zeros((len(targets), len(FEATURES)), dtype=np.float32)
    observations[np.arange(len(targets)), FIRST + targets] = 1.0
    return observations


class GuessingEnv(VecEnv):
    """Reward 1 for the right first knob. Truncates every `horizon` steps."""

    render_mode = None

    def __init__(self, lanes: int = 8, horizon: int = 16) -> None:
        low, high = np.array([bounds for _, *bounds in FEATURES], dtype=np.float32).T
        super().__init__(lanes, gym.spaces.Box(low, high), gym.spaces.MultiDiscrete(np.array(ActionTable().sizes)))
        self.horizon, self.steps, self.interrupt_after = horizon, 0, None
        self._generator = np.random.default_rng(0)

    def reset(self) -> np.ndarray:
        self._generator = np.random.default_rng(self._seeds[0])
        return self._next()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.steps += 1
        if self.interrupt_after is not None and self.steps > self.interrupt_after:
            raise KeyboardInterrupt
        rewards = (self._actions[:, 0] == self._targets).astype(np.float32)
        done = np.full(self.num_envs, self.steps % self.horizon == 0)
        last = self._next()
        observations = self._next() if done[0] else last  # a new episode begins elsewhere
        facts = {"tokens": 2.0, "seconds": 1.0, "plain_seconds": 1.5, "batch": 4.0, "gain": 0.5}
        infos: list[dict[str, Any]] = [dict(facts) for _ in rewards]
        if done[0]:
            infos = [facts | {"TimeLimit.truncated": True, "terminal_observation": row} for row in last]
        return observations, rewards, done, infos

    def _next(self) -> np.ndarray:
        self._targets = self._generator.integers(0, TARGETS, self.num_envs)
        return shown(self._targets)

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def guessed(policy: Policy) -> dict[str, float]:
    """The share of targets that a policy names, as a score."""
    right = [policy.act(row)[0] == t for t, row in enumerate(shown(np.arange(TARGETS)))]
    return {"speedup": float(np.mean(right))}


@pytest.fixture
def make_env() -> type[GuessingEnv]:
    return GuessingEnv


@pytest.fixture
def score():
    return guessed


@pytest.fixture
def show():
    return shown
