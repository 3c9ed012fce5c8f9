"""Checks whether a controller's decision can be carried out: types, shapes, numbers, budgets, whole paths.

Written for speed: a check costs some microseconds, and copies a few short vectors where the forest lies on
a GPU. A sound selection can still be a bad one; it can neither break a step nor change a token.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from echo_rl.contracts import Forest, Frontier, LoadView, Selection, SpecPlan

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """The engine's limits that no `LoadView` holds."""

    expanded: int = 96
    """Most nodes that the drafter expands for one request (`EngineConfig.max_expanded`)."""
    drafter: bool = True
    """False where there is no drafter, so that nothing speculates."""


class UnsoundDecision(Exception):
    """A decision that can't be carried out; `cause` is ``nan`` or ``invalid``."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def check_plan(plan: Any, load: LoadView) -> None:
    """Raises `UnsoundDecision` unless `plan` is a `SpecPlan` of real numbers within what `load` admits."""
    if not isinstance(plan, SpecPlan):
        _invalid(f"plan() returned a {type(plan).__name__}, not a SpecPlan")
    most = load.batch_size * load.max_nodes
    if not 0 <= _whole(plan.budget, "budget") <= most:
        _invalid(f"the plan's budget is {plan.budget}; {load.batch_size} requests may have 0 to {most} nodes")
    if not plan.budget:
        return
    if _whole(plan.max_depth, "max_depth") < 1 or _whole(plan.width, "width") < 1:
        _invalid(f"the plan speculates with depth {plan.max_depth} and width {plan.width}; both must be at least 1")
    for depth, tau in plan.gates:
        _whole(depth, "gate depth")
        if math.isnan(tau):
            raise UnsoundDecision("nan", f"the plan's gate at depth {depth} is NaN")


def clamp_plan(plan: SpecPlan, limits: Limits) -> SpecPlan:
    """Returns the plan with a tree no wider or deeper than the engine can draft; the plan itself where it fits.

    No controller sees these limits, so exceeding them is no fault.
    """
    depth = min(plan.max_depth, 1 + limits.expanded)
    fits = replace(plan, max_depth=depth, width=min(plan.width, limits.expanded)) if plan.speculates else plan
    while fits.expanded > limits.expanded:  # a nested level is quadratic in the width: step down
        fits = replace(fits, width=fits.width - 1)
    return plan if fits == plan else fits


def check_mask(mask: Any, frontier: Frontier) -> None:
    """Raises `UnsoundDecision` unless `mask` is [B] bool where the frontier is."""
    if not isinstance(mask, torch.Tensor):
        _invalid(f"extend() returned a {type(mask).__name__}, not a tensor")
    if mask.dtype != torch.bool:
        _wrong_type("extend()", mask, "bool")
    if mask.shape != frontier.alive.shape or mask.device != frontier.alive.device:
        _invalid(f"extend() returned {_shape(mask)} on {mask.device}, not {_shape(frontier.alive)}")


def check_selection(selection: Any, forest: Forest, plan: SpecPlan, max_nodes: int) -> None:
    """Raises `UnsoundDecision` unless `selection` is within the budgets and whole: every node's parent comes
    before it in its own request, one level above, and its token is one that the forest could hold."""
    if not isinstance(selection, Selection):
        _invalid(f"select() returned a {type(selection).__name__}, not a Selection")
    counts, tokens, parents, depths = (
        _vector(getattr(selection, name), name) for name in ("counts", "tokens", "parents", "depths")
    )
    size, shares = len(tokens), counts.tolist()
    if len(shares) != forest.batch_size or not len(parents) == len(depths) == size:
        _invalid(
            f"select() returned {len(shares)} counts, {size} tokens, {len(parents)} parents and {len(depths)} depths "
            f"for {forest.batch_size} requests"
        )
    if size > plan.budget:
        _invalid(f"select() took {size} nodes, the plan allows {plan.budget}")
    if min(shares) < 0 or max(shares) > max_nodes or sum(shares) != size:
        _invalid(f"select() counts {shares} for {size} nodes; a request may have 0 to {max_nodes}")
    if size:
        _check_paths(counts, parents, depths)
        if np.count_nonzero(tokens < 0) or np.count_nonzero(tokens > int(forest.tokens.max())):
            _invalid("select() returned tokens that the forest does not hold")


def _check_paths(counts: Ints, parents: Ints, depths: Ints) -> None:
    start = np.repeat(counts.cumsum() - counts, counts)  # [K] place of the request's first node
    place = parents + start  # [K] the parent's; one before the request's first node for the root
    if np.count_nonzero(parents < -1) or np.count_nonzero(place >= np.arange(len(parents))):
        _invalid("select() returned a node before its parent, or without it")
    expected = depths[place] + 1  # for the root whatever lies before
    expected[parents < 0] = 0
    if np.count_nonzero(depths != expected):
        _invalid("select() returned a node that is not one level below its parent")


def _whole(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        nan = isinstance(value, float) and math.isnan(value)
        raise UnsoundDecision(
            "nan" if nan else "invalid", f"the plan's {name} is {value!r}, not a whole number"
        ) from None


def _vector(tensor: Any, name: str) -> Ints:
    if not isinstance(tensor, torch.Tensor):
        _invalid(f"select() returned {name} as a {type(tensor).__name__}, not a tensor")
    if tensor.dtype != torch.int64:
        _wrong_type(f"select() {name}", tensor, "int64")
    if tensor.dim() != 1:
        _invalid(f"select() returned {name} of {_shape(tensor)}, not a vector")
    array: Ints = (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()
    return array


def _wrong_type(what: str, tensor: torch.Tensor, wanted: str) -> NoReturn:
    nan = tensor.is_floating_point() and bool(tensor.isnan().any())
    raise UnsoundDecision(
        "nan" if nan else "invalid", f"{what} gave {tensor.dtype}{' with NaN' if nan else ''}, not {wanted}"
    )


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _invalid(message: str) -> NoReturn:
    raise UnsoundDecision("invalid", message)
