"""Clones behaviour: a policy starts out as a copy of an analytic controller.

Shapes: N demonstrations, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.nn.functional import cross_entropy

from echo_rl.codec import ActionTable, ObservationEncoder
from echo_rl.contracts import Gates, LoadView, SpecPlan
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError
from echo_rl.learning.play import MakeController, World, play

PLAIN = 0
"""The index of zero nodes: with it, the other knobs mean nothing."""
FLOOR = 4
"""The place of the floor among the knobs."""


@dataclass(frozen=True)
class CloneOptions:
    """The settings by which the policy is started from ECHO."""

    steps: int = 18_000
    """Serving steps that are watched, over all machines and workloads; 0 starts from random weights."""
    epochs: int = 60
    """Passes over the demonstrations."""
    batch: int = 128
    """Demonstrations an optimiser step."""
    lr: float = 1e-3
    """Adam's rate."""
    smoothing: float = 0.1
    """Share of a label that is spread over all choices, so that PPO still has something to try."""
    disturbed: float = 0.2
    """Share of decisions that are carried out at random while ECHO's own is learned (DART, arXiv 1703.09327),
    so that states off ECHO's own path are seen as well."""

    def __post_init__(self) -> None:
        if self.steps < 0 or min(self.epochs, self.batch) < 1 or not self.lr > 0:
            raise ConfigError("cloning needs steps >= 0, epochs and batch >= 1 and lr > 0")
        if not (0 <= self.smoothing < 1 and 0 <= self.disturbed < 1):
            raise ConfigError("cloning needs smoothing and disturbed in [0, 1)")


@dataclass(frozen=True)
class Scene:
    """The conditions under which a controller is watched, as the policy will serve."""

    worlds: Sequence[World]
    """The machines."""
    profile: CostProfile
    """The costs that observations start from until steps were timed."""
    table: ActionTable
    gates: Gates
    workloads: Sequence[str]
    repeat: int
    """Serving steps a decision."""
    horizon: int
    """Decisions after which the observed statistics begin anew."""


@dataclass(frozen=True)
class Demonstrations:
    observations: NDArray[np.float32]  # [N, F]
    actions: NDArray[np.int64]  # [N, knobs]


def demonstrate(scene: Scene, make: MakeController, options: CloneOptions, seed: int) -> Demonstrations:
    """A controller's decisions, `options.steps` serving steps shared out evenly over the worlds and workloads."""
    observations, actions = [], []
    scenes = list(product(scene.worlds, scene.workloads))
    share = max(1, options.steps // len(scenes))
    for number, (world, workload) in enumerate(scenes, seed):
        encoder, disturb = ObservationEncoder(scene.profile), _Disturbance(scene, options.disturbed, number)
        played = play(world, make(), workload, share, number, encoder.update, disturb)
        for step, (load, plan, served) in enumerate(played):
            if step % (scene.repeat * scene.horizon) == 0:
                encoder.reset()  # so that beginnings are seen often enough
            if step % scene.repeat == 0:
                observations.append(encoder.observe(load))
                actions.append(scene.table.nearest(plan.budget / load.batch_size, plan.max_depth, plan.width))
            encoder.update(served.report)
    return Demonstrations(np.stack(observations), np.array(actions, dtype=np.int64))


class _Disturbance:
    """Puts a random action in place of the plan for a share of the decisions."""

    def __init__(self, scene: Scene, share: float, seed: int) -> None:
        self._scene, self._share = scene, share
        self._generator = np.random.default_rng(seed)
        self._calls = 0
        self._action: list[int] | None = None

    def __call__(self, load: LoadView, plan: SpecPlan) -> SpecPlan:
        if self._calls % self._scene.repeat == 0:
            drawn = self._generator.integers(self._scene.table.sizes).tolist()
            self._action = drawn if self._generator.random() < self._share else None
        self._calls += 1
        if self._action is None:
            return plan
        plan = self._scene.table.plan(self._action, load, self._scene.gates)
        return replace(plan, budget=min(plan.budget, load.batch_size * load.max_nodes))


def clone(policy: ActorCriticPolicy, shown: Demonstrations, options: CloneOptions, seed: int) -> tuple[float, ...]:
    """Fit the policy's choices to the demonstrations by cross-entropy; the share of each knob's that agrees.

    A demonstration of plain decoding says nothing of the knobs that do not matter then.
    """
    observations = torch.as_tensor(shown.observations, device=policy.device)
    actions = torch.as_tensor(shown.actions, device=policy.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=options.lr)
    policy.set_training_mode(True)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(actions), generator=generator).split(options.batch):
            optimizer.zero_grad()
            _loss(policy, observations[rows], actions[rows], options.smoothing).backward()
            optimizer.step()
    return agreement(policy, shown)


def agreement(policy: ActorCriticPolicy, shown: Demonstrations) -> tuple[float, ...]:
    """The share, for each knob, of the demonstrations in which it matters whose choice the policy finds likeliest."""
    with torch.no_grad():
        said = [part.argmax(1).cpu().numpy() for part in _logits(policy, torch.as_tensor(shown.observations))]
    counts = _matters(shown.actions)
    hits = np.stack(said, axis=1) == shown.actions
    return tuple(float(hits[counts[:, k], k].mean()) if counts[:, k].any() else 1.0 for k in range(hits.shape[1]))


def _loss(
    policy: ActorCriticPolicy, observations: torch.Tensor, actions: torch.Tensor, smoothing: float
) -> torch.Tensor:
    weights = torch.as_tensor(_matters(actions.cpu().numpy()), device=actions.device)
    total = torch.zeros((), device=actions.device)
    for knob, logits in enumerate(_logits(policy, observations)):
        each = cross_entropy(logits, actions[:, knob], label_smoothing=smoothing, reduction="none")
        total = total + (each * weights[:, knob]).mean()
    return total


def _logits(policy: ActorCriticPolicy, observations: torch.Tensor) -> list[torch.Tensor]:
    """[N, choices] a knob."""
    said = policy.get_distribution(observations.to(policy.device))
    assert isinstance(said, MultiCategoricalDistribution)
    return [part.logits for part in said.distribution]


def _matters(actions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N, knobs] whether the demonstration has anything to say about a knob: of the floor ECHO has no opinion."""
    matters = np.repeat((actions[:, :1] != PLAIN), actions.shape[1], axis=1)
    matters[:, 0], matters[:, FLOOR] = True, False
    return matters
