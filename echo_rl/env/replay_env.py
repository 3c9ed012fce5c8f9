"""The control problem over a replay as a single Gymnasium environment: the vector environment at its one index."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.env.options import checked
from echo_rl.env.vector_env import ReplayEnvOptions, ReplayVectorEnv
from echo_rl.replay.trace import Trace


class ReplayEnv(gym.Env[NDArray[np.float32], NDArray[np.int64]]):
    """``EchoRL/Replay-v0``: the problem that `SpecEnv` specifies, over recorded responses in simulated time.

    It is a `ReplayVectorEnv` of one environment, so environment i of seed s there gives the transitions of this one of
    seed s + i. It may be copied (`copy.deepcopy`) at any time: both go on alike.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        trace: Trace,
        costs: BatchedCostProfile,
        options: ReplayEnvOptions | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Raises what `ReplayVectorEnv` raises."""
        self._vector = ReplayVectorEnv(trace, costs, options, 1, AutoresetMode.DISABLED, render_mode)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    @property
    def options(self) -> ReplayEnvOptions:
        """The settings that it was made by."""
        return self._vector.options

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; its info tells the ``workload``."""
        observations, infos = self._vector.reset(seed=seed)
        (self._np_random,), (self._np_random_seed,) = self._vector.np_random, self._vector.np_random_seed
        return observations[0], _first(infos)

    def step(self, action: ArrayLike) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Serve `action_repeat` steps under this action. Raises `ConfigError` as `ReplayVectorEnv.step` does."""
        indices = checked(action, self.action_space)
        observations, rewards, _, truncated, infos = self._vector.step(indices[None])
        return observations[0], float(rewards[0]), False, bool(truncated[0]), _first(infos)


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    """The infos of the first environment, without masks."""
    values = ((name, values[0]) for name, values in infos.items() if not name.startswith("_"))
    return {name: float(value) if isinstance(value, float) else value for name, value in values}
