"""Times single passes of an idle engine at chosen sizes: the raw material of a cost profile.

The passes are the runtime's own (`Runner.verify`, `Runner.draft`) on made-up sequences; what the
tokens are doesn't matter to their cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from echo_kernels.threads import kernel_threads
from echo_rl.contracts import Request, SamplingParams, Selection, SpecPlan
from echo_rl.errors import ConfigError
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.tokenizer import TextStream


class Probe:
    """Owns the engine while it measures. Raises `ConfigError` if the engine has work."""

    def __init__(self, engine: Engine) -> None:
        if engine.has_work:
            raise ConfigError("the engine is serving requests; measure on an idle one")
        self._engine = engine

    def verify(self, batch: int, rows: int, context: int) -> float:
        """Seconds of one verify pass: `rows` rows in all, roots included, shared evenly by `batch` requests."""
        nodes = torch.tensor([(rows - batch) // batch + (i < (rows - batch) % batch) for i in range(batch)])
        place = torch.cat([torch.arange(n) for n in nodes.tolist()])
        selection = Selection(nodes, torch.full_like(place, 5), place - 1, place)
        with self._sequences(batch, context, int(nodes.max()) + 1) as sequences:
            runner, work = self._engine.runner, Batch(sequences, (), ())
            layout = runner.layout(sequences)
            with kernel_threads(runner.device):
                begin = time.perf_counter()
                runner.verify(work, selection, layout)
                return self._since(begin)

    def draft(self, batch: int, width: int, depth: int, context: int) -> float:
        """Seconds of catching up with two committed tokens a request and growing a tree without gates."""
        plan = SpecPlan(budget=batch * width, max_depth=depth, width=width)
        with self._sequences(batch, context, width * depth + 1) as sequences:
            runner = self._engine.runner
            layout = runner.layout(sequences)
            with kernel_threads(runner.device):
                begin = time.perf_counter()
                runner.draft(sequences, layout, plan, lambda frontier, plan: frontier.alive)
                return self._since(begin)

    @contextmanager
    def _sequences(self, batch: int, context: int, extra: int) -> Iterator[tuple[Sequence, ...]]:
        """Made-up sequences, released in the end."""
        engine, made = self._engine, list[Sequence]()
        most = engine.config.max_context + engine.config.headroom
        if context + extra > most:
            raise ConfigError(f"{context} + {extra} tokens pass max_context ({most}); measure fewer, or raise it")
        try:
            for i in range(batch):
                params = SamplingParams(max_new_tokens=max(1, extra))
                sequence = Sequence(Request(f"probe-{i}", (5,) * (context + 1), params), TextStream(engine.tokenizer))
                if not engine.block_manager.admit(sequence):
                    raise ConfigError(f"{batch} requests of {context} tokens don't fit the KV cache; raise kv_tokens")
                made.append(sequence)
                engine.block_manager.grow(sequence, context + extra)
                sequence.kv_len, sequence.draft_len = context, max(0, context - 2)
            yield tuple(made)
        finally:
            for sequence in made:
                engine.block_manager.release(sequence)

    def _since(self, begin: float) -> float:
        if self._engine.runner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin
