"""Wraps any Gymnasium vector environment as Stable-Baselines3 takes it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from echo_rl.errors import ConfigError


class Sb3VecEnv(VecEnv):
    """A `VectorEnv` as a `VecEnv`: one whose episodes begin anew in the same step, with numbers and texts as infos."""

    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int | None = None) -> None:
        """`seed` is for the first reset. Raises `ConfigError` on an environment of another autoreset mode."""
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ConfigError("Stable-Baselines3 needs a vector environment of autoreset_mode SameStep")
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        if seed is not None:
            self.seed(seed)

    def reset(self) -> NDArray[np.float32]:
        """Begin all episodes, with the seeds that `seed` has set since the last reset."""
        observations, infos = self.env.reset(seed=self._seeds[0])
        self.reset_infos = [_of(infos, index) for index in range(self.num_envs)]
        self._reset_seeds()
        return np.asarray(observations)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all environments; the info of one that ends is that of its last step."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        last, final = infos.pop("final_obs", None), infos.pop("final_info", {})
        rows = [_of(final if done[index] else infos, index) for index in range(self.num_envs)]
        for index in np.flatnonzero(done).tolist():
            ended = {"TimeLimit.truncated": bool(truncated[index] and not terminated[index])}
            rows[index] |= ended | {"terminal_observation": last[index]}
        return observations, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The vector environment's attribute, once for each index."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raises `ConfigError`: settings belong to all environments at once."""
        raise ConfigError("the settings of a vector environment are fixed; build another one")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Raises `ConfigError`: there is no environment apart from the others."""
        raise ConfigError("the environments of a vector environment have no methods of their own; call those of `env`")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """No environment is wrapped by itself."""
        return [False for _ in self._get_indices(indices)]


def _of(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """One environment's info, as plain numbers and texts."""
    names = [name for name in infos if not name.startswith("_") and infos[f"_{name}"][index]]
    return {name: infos[name].item(index) for name in names}
