"""Chooses the controller that a new engine process starts with."""

from __future__ import annotations


class LastGood:
    """Remembers the last controller that served its trial, rather than one that may have ended the core."""

    def __init__(self, spec: str, trial_steps: int) -> None:
        self.current = spec
        self._first = spec
        self._proven = spec
        self._trial_steps = trial_steps
        self._steps = 0

    def replaced_by(self, spec: str) -> None:
        """Notes that this controller is active from now on."""
        self.current, self._steps = spec, 0

    def on_step(self, spec: str) -> None:
        """Counts a step under a controller; one other than `current` means that the core went back to it."""
        if spec != self.current:
            self.replaced_by(spec)
        self._steps += 1
        if self._steps >= self._trial_steps:
            self._proven = spec

    def for_attempt(self, exits: int) -> str:
        """Returns the proven controller; from the third exit in a row on, the one that the server started with."""
        return self._proven if exits < 3 else self._first
