"""Interpolates cost profiles over arrays: the same numbers as `CostProfile`'s methods, for many loads at once.

Knows nothing of controllers, observations or replay. All times are seconds; arrays broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Servers = Ints | int
"""Indices of the machines that an array's entries belong to: one each along its first axis, or the only one."""
SCALARS = (
    *("step_overhead", "spec_overhead", "request_overhead", "node_overhead"),
    *("catch_up", "gate_overhead", "prefill_weight", "noise"),
)
"""Fields of a profile that `BatchedCostProfile.scalar` gives."""


class BatchedCostProfile:
    """`CostProfile` over arrays: its surfaces, interpolated for many loads at once.

    Holds either one machine, for arrays of any shape, or one a server, for arrays whose first axis is the servers.
    """

    def __init__(self, profile: CostProfile, servers: int = 0) -> None:
        """`servers`: have so many machines, all of them this one until `put` says otherwise; 0 for a single one."""
        self.profile = profile
        self._servers, self._machines = servers, [profile] * max(1, servers)
        self._scalars = np.array([[getattr(profile, name)] * len(self._machines) for name in SCALARS])  # [S, servers]
        verify_axes = (profile.batches, profile.rows, profile.contexts)
        self._verify = _Surfaces([profile.verify] * len(self._machines), verify_axes, open_axis=1)
        draft_axes = (profile.draft_batches, profile.widths, profile.depths)
        self._draft = _Surfaces([profile.draft] * len(self._machines), draft_axes, open_axis=2)

    def machine(self, server: int) -> CostProfile:
        """A server's profile."""
        return self._machines[server if self._servers else 0]

    def put(self, server: int, machine: CostProfile) -> None:
        """Give a server another machine. Raises `ConfigError` where it isn't measured on the same grid."""
        axes = ("batches", "rows", "contexts", "draft_batches", "widths", "depths")
        if not self._servers or any(getattr(machine, name) != getattr(self.profile, name) for name in axes):
            raise ConfigError("machines of servers must be measured on the same grid; derive them from one profile")
        self._machines[server] = machine
        self._verify.values[server], self._draft.values[server] = machine.verify, machine.draft
        self._scalars[:, server] = [getattr(machine, name) for name in SCALARS]

    def verify(self, batch: ArrayLike, rows: ArrayLike, context: ArrayLike) -> Floats:
        """`CostProfile.verify_seconds` over arrays."""
        return self._verify.at(self._along, batch, np.maximum(rows, batch), context)

    def draft(self, batch: ArrayLike, width: ArrayLike, depth: ArrayLike) -> Floats:
        """`CostProfile.draft_seconds` over arrays."""
        seconds = self._draft.at(self._along, batch, width, depth)
        return np.where(np.asarray(depth) > 0, seconds, 0.0)

    def level(self, batch: ArrayLike, width: ArrayLike, depth: ArrayLike) -> Floats:
        """Seconds that the level at each depth adds to those above it."""
        depths = np.asarray(depth)[..., None] - np.array([0, 1])
        both = self.draft(np.asarray(batch)[..., None], np.asarray(width)[..., None], depths)
        added: Floats = both[..., 0] - both[..., 1]
        return added

    def overhead(self, batch: ArrayLike, nodes: ArrayLike, speculative: ArrayLike) -> Floats:
        """`CostProfile.overhead_seconds` over arrays."""
        batch, nodes = np.asarray(batch, dtype=np.float64), np.asarray(nodes, dtype=np.float64)
        fixed, more, request, node = self._scalars[:4, self._along(max(batch.ndim, nodes.ndim))]
        total: Floats = fixed + request * batch + np.where(speculative, more + node * nodes, 0.0)
        return total

    def scalar(self, name: str) -> Floats:
        """One of `SCALARS`, for every server ([E]) or for the only machine ([])."""
        values: Floats = self._scalars[SCALARS.index(name), self._along(1)]
        return values

    def _along(self, axes: int) -> Servers:
        """The servers along the first of so many axes."""
        return np.arange(self._servers).reshape(-1, *(1,) * (axes - 1)) if self._servers else 0


class _Surfaces:
    """Seconds over three axes for each machine, linear between the knots."""

    def __init__(self, values: Sequence[ArrayLike], axes: Sequence[Sequence[int]], open_axis: int) -> None:
        """`open_axis` goes on past its last knot; along the others the surface stays as it is there."""
        self.values = np.stack([np.asarray(surface, dtype=np.float64) for surface in values])  # [L, A, B, C]
        self._axes = [np.asarray(axis, dtype=np.float64) for axis in axes]
        self._inner, self._open_axis = [axis[1:-1] for axis in self._axes], open_axis
        self._gaps = [np.diff(axis) for axis in self._axes]
        self._strides = np.cumprod([1, *self.values.shape[:0:-1]])[::-1].tolist()  # flat steps of L, A, B, C
        steps = [
            [0, stride] if size > 1 else [0, 0]
            for stride, size in zip(self._strides[1:], self.values.shape[1:], strict=True)
        ]
        self._corners = np.add.outer(np.add.outer(steps[0], steps[1]), steps[2])  # [2, 2, 2] from the lowest one

    def at(self, along: Callable[[int], Servers], *place: ArrayLike) -> Floats:
        """The seconds at a place, one array an axis; `along` gives the machines for arrays of so many dimensions."""
        (a, ta), (b, tb), (c, tc) = (self._locate(axis, x) for axis, x in enumerate(place))
        machines, (whole, *strides) = along(max(a.ndim, b.ndim, c.ndim)), self._strides
        lowest = np.asarray(machines * whole + a * strides[0] + b * strides[1] + c * strides[2])
        corners = self.values.reshape(-1).take(self._corners.reshape(2, 2, 2, *(1,) * lowest.ndim) + lowest)
        lines = corners[:, :, 0] + tc * (corners[:, :, 1] - corners[:, :, 0])
        faces = lines[:, 0] + tb * (lines[:, 1] - lines[:, 0])
        seconds: Floats = faces[0] + ta * (faces[1] - faces[0])
        return seconds

    def _locate(self, number: int, x: ArrayLike) -> tuple[Ints, Floats]:
        """The knot below on an axis and the position from there to the next one; see `interpolation.locate`."""
        axis, at = self._axes[number], np.asarray(x, dtype=np.float64)
        if len(axis) == 1:
            return np.zeros(at.shape, dtype=np.int64), np.zeros(at.shape)
        at = np.maximum(at, axis[0])
        at = at if number == self._open_axis else np.minimum(at, axis[-1])
        low: Ints = self._inner[number].searchsorted(at, side="right")
        return low, (at - axis.take(low)) / self._gaps[number].take(low)
