"""Serves requests on a tiny engine to their end, its laws checked at every step: for tests of any kind of step."""

from __future__ import annotations

import random

from echo_rl.contracts import Request, SamplingParams
from echo_rl.runtime.engine import Engine
from tests import tiny


def requests(count: int, temperature: float = 0.0, tokens: int = 24, **kw: object) -> list[Request]:
    rng = random.Random(count)
    return [
        Request(
            f"r{i}",
            tuple(rng.randrange(1, tiny.VOCAB) for _ in range(rng.randint(1, 40))),
            SamplingParams(temperature=temperature, seed=i, max_new_tokens=tokens, **kw),
        )
        for i in range(count)
    ]


def run(engine: Engine, controller, todo: list[Request]) -> dict[str, list[int]]:
    """All requests to completion, arriving two at a time; the conservation law and the budget checked every step."""
    outputs: dict[str, list[int]] = {r.id: [] for r in todo}
    todo = list(todo)
    while todo or engine.has_work:
        for request in todo[:2]:
            engine.add(request)
        todo = todo[2:]
        report = engine.step(controller)
        engine.check_integrity()
        assert report.verified <= report.plan.budget
        assert report.plan.speculates or report.drafted == 0
        for output in report.outputs:
            assert output.finish_reason != "error"
            outputs[output.id] += output.tokens
    assert engine.block_manager.used_share == 0.0
    return outputs
