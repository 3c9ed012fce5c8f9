"""Policies by hand."""

from __future__ import annotations

import numpy as np

from echo_rl.codec import FEATURES, ActionTable
from echo_rl.controllers.policy.network import Layer, Policy

SIZES = ActionTable().sizes


def constant_policy(action: tuple[int, ...], repeat: int = 1) -> Policy:
    """Always says this action."""
    bias = np.concatenate([np.eye(n, dtype=np.float32)[a] for n, a in zip(SIZES, action, strict=True)])
    return Policy((Layer(np.zeros((sum(SIZES), len(FEATURES)), np.float32), bias),), repeat=repeat)
