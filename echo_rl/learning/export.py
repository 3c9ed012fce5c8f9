"""Exports Stable-Baselines3's networks as the plain arrays that are served, with the commit for their manifest."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy

from echo_rl.codec import ActionTable, visible
from echo_rl.controllers.policy.network import Activation, Layer, Policy

ACTIVATIONS: dict[Activation, type[torch.nn.Module]] = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}


def export_policy(policy: ActorCriticPolicy, table: ActionTable, repeat: int, hidden: Sequence[str] = ()) -> Policy:
    """The actor alone, as a policy. Groups of observations that it was never shown (`hidden`) get weight 0."""
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    layers = [_layer(module) for module in modules if isinstance(module, torch.nn.Linear)]
    layers[0] = Layer(layers[0].weight * visible(hidden), layers[0].bias)
    return Policy(tuple(layers), table, repeat, names[policy.activation_fn])


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None outside of one. ``+`` marks local changes."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _layer(module: torch.nn.Linear) -> Layer:
    weight, bias = (p.detach().cpu().numpy().astype(np.float32) for p in (module.weight, module.bias))
    return Layer(weight.copy(), bias.copy())
