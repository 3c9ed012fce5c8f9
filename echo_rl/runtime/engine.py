"""Serves requests on the live backend. `prepare` schedules a step; `execute` drafts, selects, verifies, accepts and
commits it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from echo_kernels import backend, ops_for
from echo_kernels.threads import kernel_threads
from echo_rl.config import EngineConfig
from echo_rl.contracts import (
    AUTOREGRESSIVE,
    Controller,
    LoadView,
    Request,
    RequestOutput,
    SpecPlan,
    StepReport,
    Verdict,
)
from echo_rl.errors import ConfigError, PlanViolation, RequestError
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.contention import Contention, RunDelays
from echo_rl.runtime.device import resolve
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.models.locate import pinned, resolve_drafter, resolve_model
from echo_rl.runtime.models.target import Target
from echo_rl.runtime.runner import Runner
from echo_rl.runtime.scheduler import Batch, Scheduler
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.step.base import Clock, Step, StepResult
from echo_rl.runtime.step.device.step import DeviceStep
from echo_rl.runtime.step.eager import EagerStep
from echo_rl.runtime.step.report import report_of, verified_trees
from echo_rl.runtime.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A scheduled step that waits for its plan."""

    batch: Batch
    load: LoadView
    clock: Clock


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
        """The implementation that serves planned batches, chosen once."""
        device = self.runner.device
        if config.step == "device" or (config.step == "auto" and device.type == "cuda" and backend(device) == "triton"):
            self.serving = DeviceStep(self.runner, config, self.serving)
        self._contention = Contention(RunDelays(device))
        self._sequences: dict[str, Sequence] = {}
        self._arrived: list[str] = []  # request ids since the last step
        self._prepared: Prepared | None = None
        self.trace_trees = False
        """True where reports carry the verified trees."""
        self.max_context = min(config.max_context, target.arch.max_positions)
        """The most tokens of a prompt together with its answer."""

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
        config = pinned(config)
        folder = resolve_model(config.model, config.revision)
        positions = config.max_context + config.headroom
        target = Target.load(folder, positions, device, dtype)
        drafter_folder: Path | None = resolve_drafter(config.drafter, config.model, config.drafter_revision)
        int8 = config.drafter_weights == "auto"
        drafter = Drafter.load(drafter_folder, target, positions, int8=int8) if drafter_folder else None
        return cls(config, Tokenizer.load(folder), target, drafter)

    @property
    def has_drafter(self) -> bool:
        """True where controllers may speculate."""
        return self.runner.drafter is not None

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
        if length > self.max_context:
            raise RequestError(
                f"prompt ({len(request.prompt)}) and max_new_tokens ({request.params.max_new_tokens}) exceed "
                f"the context of {self.max_context} tokens; shorten one of them or raise max_context"
            )
        sequence = Sequence(request, TextStream(self.tokenizer, request.params.stop))
        if self.block_manager.worst_case(sequence) > self.block_manager.total:
            raise RequestError(
                f"{length} tokens do not fit the KV cache; raise kv_tokens (now {self.config.kv_tokens})"
            )
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self._arrived.append(request.id)

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its KV at once. Unknown and finished ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._prepared = None
            self.scheduler.remove(sequence)
            if request_id in self._arrived:
                self._arrived.remove(request_id)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` if KV blocks are not conserved."""
        self.block_manager.check_integrity(self._sequences.values())

    def prepare(self) -> LoadView:
        """Schedule the coming step, see `Backend`. Raises `ConfigError` where there is no work."""
        return self._scheduled().load

    def execute(self, plan: SpecPlan, controller: Controller) -> StepReport:
        """Draft, select, verify, accept and commit the prepared step, see `Backend`."""
        prepared, self._prepared = self._scheduled(), None
        batch, load, clock = prepared.batch, prepared.load, prepared.clock
        if self.runner.device.type == "cuda":
            torch.cuda.set_device(self.runner.device)
        clock.resume()
        plan = plan if batch.drafting else AUTOREGRESSIVE
        self._reserve(batch, plan)
        with kernel_threads(self.runner.device):
            result = _redrawn(batch, self.serving.run(batch, plan, controller, clock))
        del self._arrived[: load.arrived]  # those behind came after `prepare`
        outputs = self._commit(batch, result.verdict)
        clock.lap("commit")
        trees = verified_trees(batch, result) if self.trace_trees else ()
        report = report_of(load, plan, result, outputs, clock.times(), self._contention(), trees)
        controller.observe(report)
        return report

    def step(self, controller: Controller) -> StepReport:
        """Both phases, with the controller's own plan between them. What planning takes is in the report's `plan`."""
        prepared = self._scheduled()
        prepared.clock.resume()
        plan = controller.plan(prepared.load) if prepared.batch.drafting else AUTOREGRESSIVE
        prepared.clock.lap("plan")
        return self.execute(plan, controller)

    def _scheduled(self) -> Prepared:
        """The step that waits for its plan; scheduled now where none does."""
        if self._prepared is None:
            if not self.has_work:
                raise ConfigError("a step was asked for with no request queued or running; add one first")
            clock = Clock()
            batch = self.scheduler.schedule()
            self._prepared = Prepared(batch, self._load(batch), clock)
            clock.lap("schedule")
        return self._prepared

    def _load(self, batch: Batch) -> LoadView:
        lengths = [s.kv_len for s in batch.drafting]
        return LoadView(
            batch_size=len(lengths),
            prefill_tokens=batch.prefill_tokens,
            waiting=len(self.scheduler.waiting),
            mean_context=sum(lengths) / len(lengths) if lengths else 0.0,
            kv_used=self.block_manager.used_share,
            max_nodes=self.config.max_nodes,
            arrived=len(self._arrived),
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


def _redrawn(batch: Batch, result: StepResult) -> StepResult:
    """The result without what was decided for requests whose logits are not finite beside drafted nodes.

    A node that plain decoding would never have processed may be why, so these requests draw this step's token again
    in the next one, and are served plainly from now on.
    """
    verdict, counts = result.verdict, result.selection.counts.tolist()
    again = {i for i in verdict.failed if i < len(counts) and counts[i]}
    if not again:
        return result
    for i in again:
        batch.decodes[i].drafts = False
    accepted = tuple(() if i in again else path for i, path in enumerate(verdict.accepted))
    tokens = tuple(() if i in again else drawn for i, drawn in enumerate(verdict.tokens))
    logprobs = tuple(() if i in again else likely for i, likely in enumerate(verdict.logprobs))
    return replace(result, verdict=Verdict(accepted, tokens, verdict.failed - again, logprobs))
