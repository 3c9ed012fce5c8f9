"""Holds the progress of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainingProgress:
    """The progress of a run: everything that a resume needs besides PPO's own state."""

    curve: list[dict[str, float]] = field(default_factory=list)  # an evaluation each: step and scores
    best: float = float("-inf")
    notes: dict[str, Any] = field(default_factory=dict)  # plain values that the caller wants kept
