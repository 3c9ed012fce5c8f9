"""A cost profile over arrays: the same numbers as `CostProfile`'s methods, for many loads at once.

Knows nothing of controllers, observations or replay. All times are seconds; arrays broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.profile import CostProfile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scaling:
    """How another machine differs from the profile's, one number a lane: multipliers, 1 = the same.

    A pass of n rows over its plain size costs ``fixed * T(plain) + row * (T(n) - T(plain))``.
    """

    fixed: Floats
    row: Floats
    draft: Floats
    overhead: Floats

    @classmethod
    def none(cls, lanes: int) -> Scaling:
        one = np.ones(lanes)
        return cls(one, one, one, one)


class CostArrays:
    """Trilinear interpolation of a profile's surfaces, vectorised."""

    def __init__(self, profile: CostProfile) -> None:
        self.profile = profile
        self._verify = np.asarray(profile.verify)
        self._draft = np.asarray(profile.draft)
        self._verify_axes = tuple(
            np.asarray(a, dtype=np.float64) for a in (profile.batches, profile.rows, profile.contexts)
        )
        self._draft_axes = tuple(
            np.asarray(a, dtype=np.float64) for a in (profile.draft_batches, profile.widths, profile.depths)
        )

    def verify(self, batch: ArrayLike, rows: ArrayLike, context: ArrayLike) -> Floats:
        """`CostProfile.verify_seconds` over arrays."""
        return _interpolate(self._verify, self._verify_axes, (batch, np.maximum(rows, batch), context), 1)

    def draft(self, batch: ArrayLike, width: ArrayLike, depth: ArrayLike) -> Floats:
        """`CostProfile.draft_seconds` over arrays."""
        seconds = _interpolate(self._draft, self._draft_axes, (batch, width, depth), 2)
        return np.where(np.asarray(depth) > 0, seconds, 0.0)

    def overhead(self, batch: ArrayLike, nodes: ArrayLike, speculative: ArrayLike) -> Floats:
        """`CostProfile.overhead_seconds` over arrays."""
        p = self.profile
        extra = np.where(speculative, p.spec_overhead + p.node_overhead * np.asarray(nodes, dtype=np.float64), 0.0)
        total: Floats = p.step_overhead + p.request_overhead * np.asarray(batch, dtype=np.float64) + extra
        return total


def _interpolate(surface: Floats, axes: tuple[Floats, ...], at: tuple[ArrayLike, ...], open_axis: int) -> Floats:
    places = [_locate(axis, x, extrapolate=i == open_axis) for i, (axis, x) in enumerate(zip(axes, at, strict=True))]
    (a0, a1, ta), (b0, b1, tb), (c0, c1, tc) = places

    def line(a: NDArray[np.int64], b: NDArray[np.int64]) -> Floats:
        low = surface[a, b, c0]
        result: Floats = low + tc * (surface[a, b, c1] - low)
        return result

    def face(a: NDArray[np.int64]) -> Floats:
        low = line(a, b0)
        return low + tb * (line(a, b1) - low)

    low = face(a0)
    return low + ta * (face(a1) - low)


def _locate(axis: Floats, x: ArrayLike, extrapolate: bool) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Knots below and above and the position between them; see `grid.locate`."""
    x = np.asarray(x, dtype=np.float64)
    if len(axis) == 1:
        zero = np.zeros(x.shape, dtype=np.int64)
        return zero, zero, np.zeros(x.shape)
    x = np.maximum(x, axis[0]) if extrapolate else np.clip(x, axis[0], axis[-1])
    low = np.minimum(np.searchsorted(axis, x, side="right"), len(axis) - 1) - 1
    return low, low + 1, (x - axis[low]) / (axis[low + 1] - axis[low])
