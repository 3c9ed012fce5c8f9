"""The live backend: one `step` is schedule -> plan -> draft -> select -> verify -> accept -> commit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from echo_rl.config import EngineConfig
from echo_rl.contracts import (
    AUTOREGRESSIVE,
    Controller,
    Forest,
    LoadView,
    PhaseTimes,
    Request,
    RequestOutput,
    RequestTree,
    Selection,
    SpecPlan,
    StepReport,
    Verdict,
)
from echo_rl.errors import ConfigError, PlanViolation, RequestError
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.device import resolve
from echo_rl.runtime.drafter import Drafter
from echo_rl.runtime.layout import Layout
from echo_rl.runtime.runner import Runner
from echo_rl.runtime.scheduler import Batch, Scheduler
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.target import Target
from echo_rl.runtime.tokenizer import TextStream, Tokenizer
from echo_rl.runtime.verify import accept
from echo_rl.runtime.weights import resolve_drafter, resolve_model


class Engine:
    """Serves requests by continuous batching; any `Controller` may decide any step."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, target: Target, drafter: Drafter | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.runner = Runner(
            target, drafter, config.kv_tokens // config.block_size * config.block_size, config.block_size
        )
        self.block_manager = BlockManager(config.kv_tokens // config.block_size, config.block_size, config.headroom)
        eos = frozenset(target.arch.eos)
        self.scheduler = Scheduler(self.block_manager, config.max_batch_size, config.prefill_chunk, eos)
        self._sequences: dict[str, Sequence] = {}
        self._arrived = 0  # since the last step
        self.trace_trees = False
        """Whether reports carry the verified trees."""
        self._max_context = min(config.max_context, target.arch.max_positions)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load model, tokenizer and drafter. Raises `ConfigError`, `WeightsError` or `DrafterMismatch`."""
        device, dtype = resolve(config.device, config.dtype)
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = resolve_model(config.model)
        positions = config.max_context + config.headroom
        target = Target.load(folder, positions, device, dtype)
        drafter_folder: Path | None = resolve_drafter(config.drafter, config.model)
        drafter = Drafter.load(drafter_folder, target, positions) if drafter_folder else None
        return cls(config, Tokenizer.load(folder), target, drafter)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` where it could never be served."""
        vocab, length = self.runner.target.arch.vocab, len(request.prompt) + request.params.max_new_tokens
        if request.id in self._sequences:
            raise RequestError(f"request id '{request.id}' is in use; give every request its own")
        if not request.prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise RequestError(f"the prompt holds ids outside [0, {vocab}); encode it with this model's tokenizer")
        if length > self._max_context:
            raise RequestError(
                f"prompt ({len(request.prompt)}) and max_new_tokens ({request.params.max_new_tokens}) exceed "
                f"the context of {self._max_context} tokens; shorten one of them or raise max_context"
            )
        sequence = Sequence(request, TextStream(self.tokenizer, request.params.stop))
        if not self.block_manager.fits_when_empty(sequence):
            raise RequestError(
                f"{length} tokens do not fit the KV cache; raise kv_tokens (now {self.config.kv_tokens})"
            )
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self._arrived += 1

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its KV at once. Unknown and finished ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if KV blocks are not conserved."""
        self.block_manager.check_integrity(self._sequences.values())

    def step(self, controller: Controller) -> StepReport:
        """Serve one step. `has_work` must be true; raises `ConfigError` if it isn't."""
        if not self.has_work:
            raise ConfigError("step() was called with no request queued or running; add one first")
        clock = _Clock()
        batch = self.scheduler.schedule()
        load = self._load(batch)
        clock.lap("schedule")
        plan = controller.plan(load) if batch.drafting else AUTOREGRESSIVE
        layout = self._reserve(batch, plan)
        clock.lap("plan")
        forest = self.runner.draft(batch.drafting, layout, plan, controller.extend) if plan.speculates else None
        clock.lap("draft")
        selection = self._select(controller, forest, plan, len(batch.decodes))
        clock.lap("select")
        verified = self.runner.verify(batch, selection, layout)
        clock.lap("verify")
        sampling = batch.sampling
        params, logprobs = [s.request.params for s in sampling], [s.request.logprobs for s in sampling]
        verdict = accept(verified.tree, verified.logits, params, [s.next_position for s in sampling], logprobs)
        clock.lap("accept")
        self.runner.keep(layout, verdict.accepted)
        outputs = self._commit(batch, verdict)
        clock.lap("commit")
        trees = _trees(batch, forest, selection, verdict) if self.trace_trees and forest is not None else ()
        report = _report(load, plan, forest, selection, verdict, outputs, clock.times(), trees)
        controller.observe(report)
        return report

    def _load(self, batch: Batch) -> LoadView:
        lengths = [s.kv_len for s in batch.drafting]
        arrived, self._arrived = self._arrived, 0
        return LoadView(
            batch_size=len(lengths),
            prefill_tokens=batch.prefill_tokens,
            waiting=len(self.scheduler.waiting),
            mean_context=sum(lengths) / len(lengths) if lengths else 0.0,
            kv_used=self.block_manager.used_share,
            max_nodes=self.config.max_nodes,
            arrived=arrived,
            plain=len(batch.plain),
        )

    def _reserve(self, batch: Batch, plan: SpecPlan) -> Layout:
        """Blocks for everything that this step writes, and the tables that address them."""
        expanded = plan.expanded
        if expanded > self.config.max_expanded:
            raise PlanViolation(
                f"width {plan.width} x depth {plan.max_depth} expands {expanded} nodes a request, "
                f"more than max_expanded={self.config.max_expanded}"
            )
        nodes = max(expanded, min(plan.budget, self.config.max_nodes))
        for sequence in batch.decodes:
            self.block_manager.grow(sequence, sequence.kv_len + 1 + (nodes if sequence.request.speculate else 0))
        for chunk in batch.chunks:
            self.block_manager.grow(chunk.sequence, chunk.sequence.kv_len + chunk.count)
        return self.runner.layout(batch.sequences)

    def _select(self, controller: Controller, forest: Forest | None, plan: SpecPlan, decodes: int) -> Selection:
        if forest is None:
            empty = torch.zeros(0, dtype=torch.int64, device=self.runner.device)
            return Selection(empty.new_zeros(decodes), empty, empty, empty)
        selection = controller.select(forest, plan)
        if selection.size > plan.budget or int(selection.counts.max()) > self.config.max_nodes:
            raise PlanViolation(
                f"controller '{controller.name}' selected {selection.size} nodes (most for one request: "
                f"{int(selection.counts.max())}); the plan allows {plan.budget}, a request {self.config.max_nodes}"
            )
        idle = selection.counts.new_zeros(decodes - len(selection.counts))  # those that asked for no speculation
        return replace(selection, counts=torch.cat([selection.counts, idle])) if len(idle) else selection

    def _commit(self, batch: Batch, verdict: Verdict) -> tuple[RequestOutput, ...]:
        """Advance every sequence of the batch; finished and failed ones leave and free their blocks."""
        outputs = []
        for chunk in batch.chunks:
            chunk.sequence.kv_len += chunk.count
        for sequence, path in zip(batch.decodes, verdict.accepted, strict=False):
            sequence.kv_len += 1 + len(path)
        for i, sequence in enumerate(batch.sampling):
            if i in verdict.failed:
                self.cancel(sequence.id)
                message = "the model's logits are not finite; check the weights and the dtype"
                outputs.append(RequestOutput(sequence.id, (), finish_reason="error", error=message))
                continue
            self.block_manager.trim(sequence, sequence.kv_len)
            output = self.scheduler.commit(sequence, verdict.tokens[i], verdict.logprobs[i] if verdict.logprobs else ())
            if output.finish_reason:
                del self._sequences[sequence.id]
            outputs.append(output)
        return tuple(outputs)


class _Clock:
    """Seconds between laps, by phase."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[phase] = now - self._last
        self._last = now

    def times(self) -> PhaseTimes:
        return PhaseTimes(**self._laps)


def _report(
    load: LoadView,
    plan: SpecPlan,
    forest: Forest | None,
    selection: Selection,
    verdict: Verdict,
    outputs: tuple[RequestOutput, ...],
    times: PhaseTimes,
    trees: tuple[RequestTree, ...],
) -> StepReport:
    paths = verdict.accepted[: load.batch_size]
    deepest = int(selection.depths.max()) + 1 if selection.size else 0
    owner = torch.repeat_interleave(torch.arange(len(selection.counts)), selection.counts.cpu()).tolist()
    has = {(r, d) for r, d in zip(owner, selection.depths.tolist(), strict=True)}
    return StepReport(
        load=load,
        plan=plan,
        outputs=outputs,
        drafted=int(forest.exists.sum()) if forest is not None else 0,
        verified=selection.size,
        accepted=sum(map(len, paths)),
        committed=sum(len(t) for t in verdict.tokens[: load.batch_size]),
        reached_by_depth=tuple(sum(len(p) >= d and (r, d) in has for r, p in enumerate(paths)) for d in range(deepest)),
        accepted_by_depth=tuple(sum(len(p) > d for p in paths) for d in range(deepest)),
        times=times,
        drafting=forest.drafting if forest is not None else (),
        confidence=forest.first_confidence if forest is not None else (),
        trees=trees,
    )


def _trees(batch: Batch, forest: Forest, selection: Selection, verdict: Verdict) -> tuple[RequestTree, ...]:
    counts = selection.counts.tolist()[: len(batch.drafting)]
    parents = [tuple(part.tolist()) for part in selection.parents.split(counts)]
    depths = [tuple(part.tolist()) for part in selection.depths.split(counts)]
    drafted = (forest.stop_depth + 1).tolist()
    return tuple(
        RequestTree(s.id, *row)
        for s, *row in zip(batch.drafting, parents, depths, verdict.accepted, drafted, strict=False)
    )
