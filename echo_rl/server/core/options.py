"""How a server treats its controllers. Readable without torch: front and core both hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ControllerManagerOptions:
    fallback: str = "echo"
    """Decides wherever the controller in force fails."""
    deadline: float = 0.25
    """Seconds that a decision may take."""
    trial_steps: int = 200
    """Steps within which a new controller that is retired makes way for the one before."""
    build_seconds: float = 60.0
    """Seconds that building and trying out a controller may take."""
