"""Interpolates numbers on a grid of three axes, checks them, and finds the convex curve under points."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from echo_rl.errors import ConfigError

Axis = tuple[int, ...]
Surface = tuple[tuple[tuple[float, ...], ...], ...]


def check_surface(name: str, surface: Surface, axes: tuple[Axis, Axis, Axis]) -> None:
    """Raise `ConfigError` unless `surface` fits its axes and holds positive seconds that never fall as work grows."""
    for axis in axes:
        if not axis or any(b <= a for a, b in pairwise(axis)):
            raise ConfigError(f"profile axis {axis} of {name} must be increasing and not empty")
    shape = tuple(len(axis) for axis in axes)
    if len(surface) != shape[0] or any(
        len(plane) != shape[1] or any(len(line) != shape[2] for line in plane) for plane in surface
    ):
        raise ConfigError(f"profile surface {name} does not have the shape {shape} of its axes")
    for plane in surface:
        if not all(0.0 < t < math.inf for line in plane for t in line):
            raise ConfigError(f"profile surface {name} holds a time that is not positive and finite")
        columns = list(zip(*plane, strict=True))
        if any(b < a for line in (*plane, *columns) for a, b in pairwise(line)):
            raise ConfigError(f"profile surface {name} decreases where work grows; smooth it (calibrate does)")


def monotone(planes: ArrayLike) -> Surface:
    """A surface of three axes made non-decreasing along the last two."""
    risen = np.maximum.accumulate(np.maximum.accumulate(np.asarray(planes), axis=1), axis=2)
    return tuple(tuple(tuple(line) for line in plane) for plane in risen.tolist())


def locate(axis: Axis, x: float, extrapolate: bool) -> tuple[int, int, float]:
    """Knots below and above `x` and the position between them; past 1 where extrapolation is asked for."""
    if len(axis) == 1 or x <= axis[0]:
        return 0, 0, 0.0
    if x >= axis[-1] and not extrapolate:
        return len(axis) - 1, len(axis) - 1, 0.0
    low = min(bisect_right(axis, x), len(axis) - 1) - 1
    return low, low + 1, (x - axis[low]) / (axis[low + 1] - axis[low])


def interpolate(
    surface: Surface,
    axes: tuple[Axis, Axis, Axis],
    at: tuple[float, float, float],
    extrapolate: tuple[bool, bool, bool],
) -> float:
    """Trilinear interpolation. At most one axis may extrapolate, which keeps the result monotone along it."""
    a0, a1, ta = locate(axes[0], at[0], extrapolate[0])
    b0, b1, tb = locate(axes[1], at[1], extrapolate[1])
    c0, c1, tc = locate(axes[2], at[2], extrapolate[2])
    low = _face(surface[a0], b0, b1, tb, c0, c1, tc)
    return low + ta * (_face(surface[a1], b0, b1, tb, c0, c1, tc) - low) if ta else low


def _face(plane: tuple[tuple[float, ...], ...], b0: int, b1: int, tb: float, c0: int, c1: int, tc: float) -> float:
    """Bilinear interpolation within one plane."""
    row = plane[b0]
    low = row[c0] + tc * (row[c1] - row[c0])
    if not tb:
        return low
    row = plane[b1]
    return low + tb * (row[c0] + tc * (row[c1] - row[c0]) - low)


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the convex curve under the points, from the first to the last; x must increase."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
