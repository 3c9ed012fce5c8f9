"""Interpolates cost profiles over arrays: the same numbers as `CostProfile`'s methods, for many loads at once.

Knows nothing of controllers, observations or replay. All times are seconds; arrays broadcast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Lanes = Ints | int
"""Indices of the machines that an array's entries belong to: one each along its first axis, or the only one."""
SCALARS = (
    *("step_overhead", "spec_overhead", "request_overhead", "node_overhead"),
    *("catch_up", "gate_overhead", "prefill_weight", "noise"),
)
"""Fields of a profile that `BatchedCostProfile.scalar` gives."""


class BatchedCostProfile:
    """`CostProfile` over arrays: its surfaces, interpolated for many loads at once.

    Holds either one machine, for arrays of any shape, or one a lane, for arrays whose first axis is the lanes.
    """

    def __init__(self, profile: CostProfile, lanes: int = 0) -> None:
        """`lanes`: have so many machines, all of them this one until `put` says otherwise; 0 for a single one."""
        self.profile = profile
        self._lanes, self._machines = lanes, [profile] * max(1, lanes)
        self._verify, self._draft = (
            np.stack([np.asarray(surface)] * len(self._machines)) for surface in (profile.verify, profile.draft)
        )
        self._scalars = np.array([[getattr(profile, name)] * len(self._machines) for name in SCALARS])  # [S, lanes]
        self._verify_axes = _axes(profile.batches, profile.rows, profile.contexts)
        self._draft_axes = _axes(profile.draft_batches, profile.widths, profile.depths)

    def machine(self, lane: int) -> CostProfile:
        """A lane's profile."""
        return self._machines[lane if self._lanes else 0]

    def put(self, lane: int, machine: CostProfile) -> None:
        """Give a lane another machine. Raises `ConfigError` where it isn't measured on the same grid."""
        axes = ("batches", "rows", "contexts", "draft_batches", "widths", "depths")
        if not self._lanes or any(getattr(machine, name) != getattr(self.profile, name) for name in axes):
            raise ConfigError("machines of lanes must be measured on the same grid; derive them from one profile")
        self._machines[lane] = machine
        self._verify[lane], self._draft[lane] = np.asarray(machine.verify), np.asarray(machine.draft)
        self._scalars[:, lane] = [getattr(machine, name) for name in SCALARS]

    def verify(self, batch: ArrayLike, rows: ArrayLike, context: ArrayLike) -> Floats:
        """`CostProfile.verify_seconds` over arrays."""
        return self._interpolate(self._verify, self._verify_axes, (batch, np.maximum(rows, batch), context), 1)

    def draft(self, batch: ArrayLike, width: ArrayLike, depth: ArrayLike) -> Floats:
        """`CostProfile.draft_seconds` over arrays."""
        seconds = self._interpolate(self._draft, self._draft_axes, (batch, width, depth), 2)
        return np.where(np.asarray(depth) > 0, seconds, 0.0)

    def overhead(self, batch: ArrayLike, nodes: ArrayLike, speculative: ArrayLike) -> Floats:
        """`CostProfile.overhead_seconds` over arrays."""
        batch, nodes = np.asarray(batch, dtype=np.float64), np.asarray(nodes, dtype=np.float64)
        fixed, more, request, node = self._scalars[:4, self._lane(max(batch.ndim, nodes.ndim))]
        total: Floats = fixed + request * batch + np.where(speculative, more + node * nodes, 0.0)
        return total

    def scalar(self, name: str) -> Floats:
        """One of `SCALARS`, for every lane ([E]) or for the only machine ([])."""
        values: Floats = self._scalars[SCALARS.index(name), self._lane(1)]
        return values

    def _lane(self, axes: int) -> Lanes:
        """The lanes along the first of so many axes."""
        return np.arange(self._lanes).reshape(-1, *(1,) * (axes - 1)) if self._lanes else 0

    def _interpolate(
        self, surfaces: Floats, axes: tuple[Floats, ...], at: tuple[ArrayLike, ...], open_axis: int
    ) -> Floats:
        places = [
            _locate(axis, x, extrapolate=i == open_axis) for i, (axis, x) in enumerate(zip(axes, at, strict=True))
        ]
        (a0, a1, ta), (b0, b1, tb), (c0, c1, tc) = places
        lane = self._lane(max(a0.ndim, b0.ndim, c0.ndim))

        def line(a: Ints, b: Ints) -> Floats:
            low = surfaces[lane, a, b, c0]
            result: Floats = low + tc * (surfaces[lane, a, b, c1] - low)
            return result

        def face(a: Ints) -> Floats:
            low = line(a, b0)
            return low + tb * (line(a, b1) - low)

        low = face(a0)
        return low + ta * (face(a1) - low)


def _axes(*axes: tuple[int, ...]) -> tuple[Floats, ...]:
    return tuple(np.asarray(axis, dtype=np.float64) for axis in axes)


def _locate(axis: Floats, x: ArrayLike, extrapolate: bool) -> tuple[Ints, Ints, Floats]:
    """Knots below and above and the position between them; see `interpolation.locate`."""
    x = np.asarray(x, dtype=np.float64)
    if len(axis) == 1:
        zero = np.zeros(x.shape, dtype=np.int64)
        return zero, zero, np.zeros(x.shape)
    x = np.maximum(x, axis[0]) if extrapolate else np.clip(x, axis[0], axis[-1])
    low = np.minimum(np.searchsorted(axis, x, side="right"), len(axis) - 1) - 1
    return low, low + 1, (x - axis[low]) / (axis[low + 1] - axis[low])
