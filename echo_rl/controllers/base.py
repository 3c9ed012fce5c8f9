"""Gives every controller the default rules that it shares with the others. The functions that select nodes of a forest
are in `selection`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.selection import likeliest, passing


class BaseController(ABC):
    """The defaults of `Controller`; a rule overrides only what it changes.

    A subclass states its knobs in `propose`. `plan` then holds them to what the load admits (no
    requests: no speculation; never more than `max_nodes` a request) and remembers that cap for
    `select`, which has no view of the load.
    """

    name: str = ""

    def __init__(self, options: Any = None) -> None:
        self.options = options
        self._node_cap: int | None = None
        self.materials: tuple[object, ...] = ()
        """Everything that it was made of besides its options, such as the contents of the files that these name."""

    @abstractmethod
    def propose(self, load: LoadView) -> SpecPlan:
        """The knobs of the coming step, for a batch of at least one request."""

    def plan(self, load: LoadView) -> SpecPlan:
        self._node_cap = load.max_nodes
        if load.batch_size < 1 or load.max_nodes < 1:
            return AUTOREGRESSIVE
        plan = self.propose(load)
        most = load.batch_size * load.max_nodes
        return plan if plan.budget <= most else replace(plan, budget=most)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose best path is at least as likely as the plan's gate at this depth."""
        gate = plan.gate(frontier.depth)
        return frontier.alive if gate is None else passing(frontier, gate)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        return likeliest(forest, plan.budget, self._node_cap)

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """The power of path probabilities at each depth, the last holding beyond (() for 1 everywhere), by which a
        backend may gate and select in this rule's place; None where the rule must be asked."""
        return () if self._decides_as(BaseController) and not plan.floor else None

    def _decides_as(self, rule: Any) -> bool:
        """True where gates and selection are still those of that class."""
        own = type(self)
        return own.extend is rule.extend and own.select is rule.select

    def observe(self, report: StepReport) -> None:
        del report  # a fixed rule learns nothing
