"""Counts that an engine core keeps since its start, made to last over restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class RestartSafeCounter:
    """Sums the last counts of every core, where each counts from 0."""

    def __init__(self) -> None:
        self.current: Mapping[str, int] = {}
        """The counts of the running core since its start."""
        self._past: Counter[str] = Counter()  # of the cores before it

    def restart(self) -> None:
        """Keeps the counts of a core that is gone."""
        self._past.update(self.current)
        self.current = {}

    @property
    def total(self) -> dict[str, int]:
        """Returns the counts of all cores."""
        total = self._past.copy()
        total.update(self.current)
        return dict(total)
