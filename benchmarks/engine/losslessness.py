"""Are the tokens those of plain decoding?

float32: every controller at batch 1, 4 and 16, greedy and sampled, against plain decoding one
request at a time; the tokens must be equal. bfloat16: the rate at which requests diverge, and at
each first divergence of a greedy request the gap between the plain run's two largest logits there,
which shows whether it was a near-tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.common import CONSOLE, EngineOptions, Ledger, Place, main
from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller, Request, SamplingParams
from echo_rl.controllers import registry
from echo_rl.experiments.report.measures import first_difference
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import environment_of, load_engine
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import load_prompts
from echo_rl.workloads.driver import serve
from echo_rl.workloads.requests import chat_requests

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Args:
    """Compare every controller's tokens with those of plain decoding."""

    quick: bool = False
    """Takes a few minutes: fewer requests, tokens and batches."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """The number formats that are compared."""
    requests: int = 16
    """Requests in a cell."""
    max_new_tokens: int = 32
    """Tokens of a request; end-of-sequence is ignored, so that every cell has its full count."""
    batches: tuple[int, ...] = (1, 4, 16)
    temperatures: tuple[float, ...] = (0.0, 0.8)
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        return replace(self, requests=4, max_new_tokens=16, batches=(1, 4)) if self.quick else self


class GapRecorder:
    """While open, keeps the gap between the two largest logits at every token that `engine` samples.

    Only valid for plain decoding, where each sampling request has one row a step.
    """

    def __init__(self, engine: Engine) -> None:
        self._runner = engine.runner
        self.gaps: dict[str, list[float]] = {}

    def __enter__(self) -> GapRecorder:
        verify = self._runner.verify

        def recording(batch: Any, selection: Any, layout: Any) -> Any:
            sampling = [sequence.id for sequence in batch.sampling]
            verified = verify(batch, selection, layout)
            if sampling:
                logits = verified.logits
                top = logits.values[[logits.place[row] for row in verified.tree.roots]].float().topk(2).values
                for request_id, gap in zip(sampling, (top[:, 0] - top[:, 1]).tolist(), strict=True):
                    self.gaps.setdefault(request_id, []).append(gap)
            return verified

        self._runner.verify = recording  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._runner.verify


def controllers() -> list[str]:
    """Every registered controller, plain decoding first."""
    return ["none", *(name for name in registry.names() if name not in ("none", "oracle"))]


class Comparison:
    """One number format: a plain reference per temperature, and cells against it."""

    def __init__(self, args: Args, dtype: str, ledger: Ledger) -> None:
        self.args, self.dtype, self.ledger = args, dtype, ledger
        self.prompts = load_prompts("all", limit=args.requests, seed=args.seed)

    @cached_property
    def engine(self) -> Engine:
        return load_engine(replace(self.args.engine, dtype=self.dtype))[0]

    def requests(self, temperature: float) -> list[Request]:
        def params(index: int) -> SamplingParams:
            return SamplingParams(
                temperature, seed=self.args.seed + index, max_new_tokens=self.args.max_new_tokens, ignore_eos=True
            )

        return chat_requests(self.engine, self.prompts, params)

    def fresh(self, name: str, batch: int, temperature: float) -> dict[str, list[int]]:
        """The tokens under a new controller of that name."""
        return self.tokens(registry.make(name), batch, temperature)

    def tokens(self, controller: Controller, batch: int, temperature: float) -> dict[str, list[int]]:
        record = serve(self.engine, controller, self.requests(temperature), batch)
        return {request.id: list(request.tokens) for request in record.requests}

    def reference(self, temperature: float) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            with GapRecorder(self.engine) as recorder:
                tokens = self.tokens(registry.make("none"), 1, temperature)
            return {"tokens": tokens, "gaps": recorder.gaps}

        value: dict[str, Any] = self.ledger.cell({"reference": self.dtype, "temperature": temperature}, compute)
        return value

    def cells(self) -> Iterator[dict[str, Any]]:
        for temperature in self.args.temperatures:
            reference = self.reference(temperature)
            for name in controllers():
                for batch in self.args.batches:
                    key = {"dtype": self.dtype, "controller": name, "batch": batch, "temperature": temperature}
                    tokens = self.ledger.cell(key, partial(self.fresh, name, batch, temperature))
                    yield {**key, **compare(tokens, reference, greedy=temperature == 0)}


def compare(tokens: dict[str, list[int]], reference: dict[str, Any], greedy: bool) -> dict[str, Any]:
    """Token counts, and each divergent request's first different position with the logit gap there."""
    divergences = []
    for request_id, ours in tokens.items():
        plain = reference["tokens"][request_id]
        if ours != plain:
            at = first_difference(ours, plain)
            gap = reference["gaps"][request_id][at] if greedy and at < len(plain) else None
            divergences.append({"request": request_id, "position": at, "logit_gap": gap})
    return {
        "requests": len(tokens),
        "tokens": sum(map(len, tokens.values())),
        "divergences": divergences,
    }


def totals(cells: Sequence[dict[str, Any]], gaps: Sequence[float]) -> dict[str, Any]:
    """Sums over all cells of a number format; `gaps` are those of every greedy token, for scale."""
    diverged = [d for cell in cells for d in cell["divergences"]]
    at = [d["logit_gap"] for d in diverged if d["logit_gap"] is not None]
    requests = sum(cell["requests"] for cell in cells)
    return {
        "requests": requests,
        "tokens": sum(cell["tokens"] for cell in cells),
        "diverged_requests": len(diverged),
        "divergence_rate": len(diverged) / requests,
        "logit_gap_at_divergence": quantiles(at),
        "logit_gap_everywhere": quantiles(gaps),
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"p10": float(low), "median": float(middle), "p90": float(high), "max": float(max(values))}


def script() -> None:
    args = tyro.cli(Args).sized()
    place = Place("losslessness", args.quick)
    environments = {dtype: environment_of(replace(args.engine, dtype=dtype)) for dtype in args.dtypes}
    ledger = Ledger(place.work, {**asdict(args), "environment": environments, "controllers": controllers()})
    result: dict[str, Any] = {"settings": asdict(args), "dtypes": {}}
    for dtype in args.dtypes:
        comparison = Comparison(args, dtype, ledger)
        cells = list(comparison.cells())
        gaps = [gap for t in args.temperatures if t == 0 for g in comparison.reference(t)["gaps"].values() for gap in g]
        result["dtypes"][dtype] = {**totals(cells, gaps), "environment": environments[dtype], "cells": cells}
    write_json(place.result, result)
    for dtype, found in result["dtypes"].items():
        CONSOLE.print(
            f"{dtype}: {found['diverged_requests']} of {found['requests']} requests diverge, {found['tokens']} tokens"
        )


if __name__ == "__main__":
    main(script)
