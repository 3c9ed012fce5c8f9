"""Which controller a new engine process begins with after a death."""

from __future__ import annotations


class LastGood:
    """Which controller to start again with: one that has served its trial, not one that may have killed the core."""

    def __init__(self, spec: str, trial_steps: int) -> None:
        self.current = spec
        self._first = spec
        self._proven = spec
        self._trial_steps = trial_steps
        self._steps = 0

    def swapped(self, spec: str) -> None:
        self.current, self._steps = spec, 0

    def stepped(self, spec: str) -> None:
        """A step under this controller: another one than thought means that the core went back to it."""
        if spec != self.current:
            self.swapped(spec)
        self._steps += 1
        if self._steps >= self._trial_steps:
            self._proven = spec

    def for_attempt(self, deaths: int) -> str:
        """The proven one; from the third death in a row on, the one that the server began with."""
        return self._proven if deaths < 3 else self._first
