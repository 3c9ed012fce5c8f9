"""Runs the calibrations on a live engine: what `echo_rl.calibrate` needs to be handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from echo_rl.calibrate.gates import GateObservation, best_paths
from echo_rl.contracts import Controller, Forest, Frontier, LoadView, Request, Selection, SpecPlan, StepReport
from echo_rl.loop import ServingEngine, serve


class GateObserver:
    """Speculates as `inner` does, and keeps how every forest's best paths fared against the target's tokens."""

    def __init__(self, inner: Controller) -> None:
        self.name = f"observed {inner.name}"
        self.observations: list[GateObservation] = []
        self._inner = inner
        self._forest: Forest | None = None

    def plan(self, load: LoadView) -> SpecPlan:
        return self._inner.plan(load)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> torch.Tensor:
        return self._inner.extend(frontier, plan)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        self._forest = forest
        return self._inner.select(forest, plan)

    def observe(self, report: StepReport) -> None:
        if self._forest is not None:  # decoding requests come first among the outputs, in the forest's order
            tokens = [output.tokens for output in report.outputs[: report.load.batch_size]]
            self.observations.extend(best_paths(_on_cpu(self._forest), tokens))
            self._forest = None
        self._inner.observe(report)


def observe_gates(
    engine: ServingEngine, controller: Controller, requests: Sequence[Request], concurrency: int
) -> list[GateObservation]:
    """Serves the requests; one observation per request, step and depth that can be judged."""
    observer = GateObserver(controller)
    serve(engine, observer, requests, concurrency)
    return observer.observations


def _on_cpu(forest: Forest) -> Forest:
    names = ("tokens", "parents", "depths", "scores", "stop_depth")
    return replace(forest, **{name: getattr(forest, name).cpu() for name in names})
