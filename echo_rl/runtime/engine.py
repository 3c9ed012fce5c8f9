"""The live backend: one `step` is schedule -> plan -> draft -> select -> verify -> accept -> commit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from echo_kernels import backend, ops_for
from echo_rl.config import EngineConfig
from echo_rl.contracts import (
    AUTOREGRESSIVE,
    Controller,
    LoadView,
    PhaseTimes,
    Request,
    RequestOutput,
    RequestTree,
    SpecPlan,
    StepReport,
    Verdict,
)
from echo_rl.errors import ConfigError, PlanViolation, RequestError
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.device import resolve
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.models.target import Target
from echo_rl.runtime.models.weights import resolve_drafter, resolve_model
from echo_rl.runtime.runner import Runner
from echo_rl.runtime.scheduler import Batch, Scheduler
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.step.base import Clock, Step, StepResult
from echo_rl.runtime.step.device.step import DeviceStep
from echo_rl.runtime.step.eager import EagerStep
from echo_rl.runtime.tokenizer import TextStream, Tokenizer


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
        self.serving: Step = EagerStep(self.runner, config.max_nodes)
        """How a planned batch is served, chosen once."""
        device = self.runner.device
        if config.step == "device" or (config.step == "auto" and device.type == "cuda" and backend(device) == "triton"):
            self.serving = DeviceStep(self.runner, config, self.serving)
        self._sequences: dict[str, Sequence] = {}
        self._arrived = 0  # since the last step
        self.trace_trees = False
        """Whether reports carry the verified trees."""
        self._max_context = min(config.max_context, target.arch.max_positions)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load model, tokenizer and drafter. Raises `ConfigError`, `WeightsError` or `DrafterMismatch`.

        Makes its GPU the current one of this thread, as a step does of the thread that takes it.
        """
        device, dtype = resolve(config.device, config.dtype)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            ops_for(device)
        except (ValueError, RuntimeError) as error:  # kernels that were asked for by name and can't be had
            raise ConfigError(str(error)) from error
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = resolve_model(config.model)
        positions = config.max_context + config.headroom
        target = Target.load(folder, positions, device, dtype)
        drafter_folder: Path | None = resolve_drafter(config.drafter, config.model)
        int8 = config.drafter_weights == "auto"
        drafter = Drafter.load(drafter_folder, target, positions, int8=int8) if drafter_folder else None
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
        if self.runner.device.type == "cuda":
            torch.cuda.set_device(self.runner.device)
        clock = Clock()
        batch = self.scheduler.schedule()
        load = self._load(batch)
        clock.lap("schedule")
        plan = controller.plan(load) if batch.drafting else AUTOREGRESSIVE
        self._reserve(batch, plan)
        served = _taken_back(batch, self.serving.run(batch, plan, controller, clock))
        outputs = self._commit(batch, served.verdict)
        clock.lap("commit")
        trees = _trees(batch, served) if self.trace_trees else ()
        report = _report(load, plan, served, outputs, clock.times(), trees)
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

    def _reserve(self, batch: Batch, plan: SpecPlan) -> None:
        """Blocks for everything that this step writes."""
        expanded = plan.expanded
        if expanded > self.config.max_expanded:
            raise PlanViolation(
                f"width {plan.width} x depth {plan.max_depth} expands {expanded} nodes a request, "
                f"more than max_expanded={self.config.max_expanded}"
            )
        nodes = max(expanded, min(plan.budget, self.config.max_nodes))
        for sequence in batch.decodes:
            self.block_manager.grow(sequence, sequence.kv_len + 1 + (nodes if sequence.drafts else 0))
        for chunk in batch.chunks:
            self.block_manager.grow(chunk.sequence, chunk.sequence.kv_len + chunk.count)

    def _commit(self, batch: Batch, verdict: Verdict) -> tuple[RequestOutput, ...]:
        """Advance every sequence of the batch; finished and failed ones leave and free their blocks."""
        outputs = []
        for chunk in batch.chunks:
            chunk.sequence.kv_len += chunk.count
        for sequence, path, tokens in zip(batch.decodes, verdict.accepted, verdict.tokens, strict=False):
            sequence.kv_len += 1 + len(path) if tokens else 0
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


def _taken_back(batch: Batch, served: StepResult) -> StepResult:
    """Without what was decided for requests whose logits are not finite beside drafted nodes.

    A node that plain decoding would never have processed may be why, so they are served plainly from now on, this
    step again.
    """
    verdict, counts = served.verdict, served.selection.counts.tolist()
    again = {i for i in verdict.failed if i < len(counts) and counts[i]}
    if not again:
        return served
    for i in again:
        batch.decodes[i].drafts = False
    accepted = tuple(() if i in again else path for i, path in enumerate(verdict.accepted))
    tokens = tuple(() if i in again else drawn for i, drawn in enumerate(verdict.tokens))
    logprobs = tuple(() if i in again else likely for i, likely in enumerate(verdict.logprobs))
    return replace(served, verdict=Verdict(accepted, tokens, verdict.failed - again, logprobs))


def _report(
    load: LoadView,
    plan: SpecPlan,
    served: StepResult,
    outputs: tuple[RequestOutput, ...],
    times: PhaseTimes,
    trees: tuple[RequestTree, ...],
) -> StepReport:
    verdict, selection, growth = served.verdict, served.selection, served.growth
    paths = verdict.accepted[: load.batch_size]
    depths = selection.depths.tolist()
    deepest = max(depths, default=-1) + 1
    owner = [r for r, count in enumerate(selection.counts.tolist()) for _ in range(count)]
    has = set(zip(owner, depths, strict=True))
    return StepReport(
        load=load,
        plan=plan,
        outputs=outputs,
        drafted=growth.drafted if growth else 0,
        verified=selection.size,
        accepted=sum(map(len, paths)),
        committed=sum(len(t) for t in verdict.tokens[: load.batch_size]),
        reached_by_depth=tuple(sum(len(p) >= d and (r, d) in has for r, p in enumerate(paths)) for d in range(deepest)),
        accepted_by_depth=tuple(sum(len(p) > d for p in paths) for d in range(deepest)),
        times=times,
        drafting=growth.drafting if growth else (),
        confidence=growth.confidence if growth else (),
        trees=trees,
    )


def _trees(batch: Batch, served: StepResult) -> tuple[RequestTree, ...]:
    if served.growth is None:
        return tuple(RequestTree(s.id, (), (), (), 0) for s in batch.drafting)
    selection = served.selection
    counts = selection.counts.tolist()[: len(batch.drafting)]
    parents = [tuple(part.tolist()) for part in selection.parents.split(counts)]
    depths = [tuple(part.tolist()) for part in selection.depths.split(counts)]
    rows = zip(batch.drafting, parents, depths, served.verdict.accepted, served.growth.levels, strict=False)
    return tuple(RequestTree(s.id, above, depth, accepted, levels) for s, above, depth, accepted, levels in rows)
