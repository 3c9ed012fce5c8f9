"""Counts that an engine core keeps since its start, made to last over restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class RestartSafeCounter:
    """The sum over all cores of what each counted last."""

    def __init__(self) -> None:
        self._past: Counter[str] = Counter()  # of cores that are gone
        self._now: Mapping[str, int] = {}

    def see(self, counts: Mapping[str, int]) -> None:
        """The counts of the core that runs, since its start."""
        self._now = counts

    def begin_anew(self) -> None:
        """The core is gone: the next one counts from 0."""
        self._past.update(self._now)
        self._now = {}

    @property
    def total(self) -> dict[str, int]:
        total = self._past.copy()
        total.update(self._now)
        return dict(total)
