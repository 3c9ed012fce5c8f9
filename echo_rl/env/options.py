"""Holds what all environments of the problem share: their settings, their spaces and the check of actions."""

from __future__ import annotations

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.codec import FEATURES, ActionTable
from echo_rl.contracts import Gates
from echo_rl.env.reward import RewardOptions
from echo_rl.errors import ConfigError
from echo_rl.workloads.arrivals import Workload, closed

MEANS = ("batch", "budget", "depth", "width")
"""Entries of `info` that are averaged over repeated serving steps; all others are summed."""


@dataclass(frozen=True)
class SpecEnvOptions:
    """The settings of an environment: its workloads, its reward and its episodes. Raises `ConfigError`."""

    workloads: tuple[Workload, ...] = tuple(closed(c) for c in (1, 2, 4, 8, 16, 32))
    """One is drawn for each episode."""
    table: ActionTable = field(default_factory=ActionTable)
    """The actions and what they stand for."""
    gates: Gates = ()
    """The calibrated sparse thresholds, (depth, tau)."""
    reward: RewardOptions = field(default_factory=RewardOptions)
    """The form of the reward and its constants."""
    horizon: int = 512
    """Environment steps an episode."""
    action_repeat: int = 1
    """Serving steps under one action."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.action_repeat < 1 or not self.workloads:
            raise ConfigError("an environment needs horizon >= 1, action_repeat >= 1 and at least one workload")


def observation_space() -> gym.spaces.Box[np.float32]:
    """The codec's observations with their bounds."""
    low, high = np.array([bounds for _, *bounds in FEATURES], dtype=np.float32).T
    return gym.spaces.Box(low, high, dtype=np.float32)


def action_space(table: ActionTable) -> gym.spaces.MultiDiscrete:
    """One index a knob of the table."""
    return gym.spaces.MultiDiscrete(np.array(table.sizes))


def checked(actions: ArrayLike, space: gym.Space[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The actions as whole numbers of the space's shape. Raises `ConfigError`; the table refuses what is outside it."""
    indices = np.asarray(actions)
    if indices.shape != space.shape or not np.issubdtype(indices.dtype, np.integer):
        raise ConfigError(f"action {actions!r} is not whole numbers of shape {space.shape}, one a knob")
    return indices


def refuse_rendering(render_mode: str | None) -> None:
    """Raises Gymnasium's `UnsupportedMode`: a server has nothing to draw."""
    if render_mode is not None:
        raise gym.error.UnsupportedMode(f"render_mode={render_mode!r} is not in the possible render_modes ([])")
