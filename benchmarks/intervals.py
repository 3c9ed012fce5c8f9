"""Intervals of means over policies and seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from echo_rl.errors import ConfigError
from echo_rl.utils.statistics import Interval, bootstrap


def geometric_mean(ratios: ArrayLike, resamples: int = 2000, seed: int = 0) -> Interval:
    """Geometric mean of ratios. [N]: independent ones. [T, N]: of T things (policies) that all met the same N (seeds).

    T and N are resampled each by itself (pigeonhole bootstrap, Owen 2007: never too narrow); `blocks` is N. Raises
    `ConfigError` where there is none.
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    if not logs.size:
        raise ConfigError("a mean needs at least one ratio")
    if logs.ndim == 1 or len(logs) == 1:
        flat = logs.reshape(-1)
        return bootstrap(lambda rows: np.exp(flat[rows].mean(-1)), len(flat), resamples=resamples, seed=seed)
    drawn = np.random.default_rng((seed, len(logs))).integers(len(logs), size=(resamples, len(logs), 1))

    def mean(rows: np.ndarray) -> np.ndarray:
        resampled: np.ndarray = logs.mean() if rows.ndim == 1 else logs[drawn, rows[:, None, :]].mean((1, 2))
        return np.exp(resampled)

    return bootstrap(mean, logs.shape[1], resamples=resamples, seed=seed)
