"""Serves a step that the host launches and then waits for once, for its tokens.

Between the inputs' copy and the results' copy nothing is read back. The draft and the verification are
two bodies, each captured as a graph a bucket; a pass that also holds prompt rows, whose number is
anything, runs its verification as launched. A step that the device can't decide is the eager one's,
counted by cause.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from echo_kernels.device_interface import TreeRows
from echo_kernels.device_ops import DeviceOps, device_ops_for
from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller, SpecPlan
from echo_rl.runtime.runner import Runner
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.step.base import Clock, Step, StepResult
from echo_rl.runtime.step.device.buckets import Bucket, Buckets
from echo_rl.runtime.step.device.buffers import Landing, Stopwatch
from echo_rl.runtime.step.device.drafter import DeviceDrafter
from echo_rl.runtime.step.device.graphs import Capture, Graphs, capture_for
from echo_rl.runtime.step.device.inputs import Inputs, Pairs, Prompts, filters
from echo_rl.runtime.step.device.results import Sizes, draft_size, pack_draft, pack_step, step_size, unpack_step
from echo_rl.runtime.step.device.rule import DevicePlan, device_plan
from echo_rl.runtime.step.device.verification import Verification, single_rows


@dataclass
class StepCounts:
    """Counts of the ways in which steps were served."""

    device: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    """Steps that the host decided, by cause: ``controller`` (gates or selection of its own), ``logprobs``, ``nested``,
    ``width``, ``drafter`` (there is none)."""


class DeviceStep:
    """Serves what it can on the device and leaves the rest to `eager`. One engine's, one thread's."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        eager: Step,
        decisions: DeviceOps | None = None,
        capture: Capture | None = None,
    ) -> None:
        device, drafter = runner.device, runner.drafter
        decisions = decisions or device_ops_for(device)
        self.counts = StepCounts()
        self.graphs = Graphs(capture or capture_for(device))
        self._eager = eager
        self._buckets = Buckets(config.max_batch_size, config.max_nodes)
        self._inputs = Inputs(config, runner.spare, device)
        taps = drafter.taps if drafter is not None else ()
        self._verification = Verification(runner.target, taps, runner.cache, runner.spare, decisions)
        self._drafter = None
        if drafter is not None:
            self._drafter = DeviceDrafter(drafter, runner.cache, runner.spare, decisions, config.max_nodes)
        largest = Bucket(config.max_batch_size, self._buckets.nodes[-1], config.max_expanded + 1, 1, True)
        self._rows = _tree_buffers(largest, config.max_nodes, device)
        self._drafted = torch.zeros(draft_size(largest), dtype=torch.int32, device=device)
        self.landing = Landing(step_size(largest, min(config.prefill_chunk, config.max_batch_size)), device)
        self._watch = Stopwatch(device)

    @torch.inference_mode()
    def run(self, batch: Batch, plan: SpecPlan, controller: Controller, clock: Clock) -> StepResult:
        numbers = device_plan(plan, controller, batch)
        if not isinstance(numbers, str) and numbers.budget and self._drafter is None:
            numbers = "drafter"
        if isinstance(numbers, str):
            self.counts.eager[numbers] += 1
            return self._eager.run(batch, plan, controller, clock)
        self.counts.device += 1
        filtered = any(filters(s.request.params) for s in batch.sampling)
        bucket = self._buckets.of(len(batch.decodes), len(batch.drafting), numbers, filtered)
        prompts, pairs = self._send(batch, numbers, bucket)
        clock.lap("plan")
        landed = self.landing.read(self.launch(bucket, pairs, prompts))
        clock.lap("verify")
        if pairs is not None:
            clock.move(self._watch.seconds(), "verify", "draft")
        ending = len(prompts.ends) if prompts is not None else 0
        served = unpack_step(landed, bucket, Sizes(len(batch.decodes), len(batch.drafting), ending))
        clock.lap("accept")
        return served

    def _send(self, batch: Batch, plan: DevicePlan, bucket: Bucket) -> tuple[Prompts | None, Pairs | None]:
        self._inputs.send_batch(batch, plan, bucket)
        prompts = self._inputs.send_prompts(batch.chunks)
        if not bucket.nodes:
            return prompts, None
        pairs = self._inputs.send_pairs(batch.drafting)
        for sequence in batch.drafting:
            sequence.draft_len = sequence.kv_len
        return prompts, pairs

    def launch(self, bucket: Bucket, pairs: Pairs | None, prompts: Prompts | None) -> Tensor:
        """All device work of a step; `pairs` is None in a plain one. Returns `pack_step`'s vector without a wait."""
        if pairs is not None:
            assert self._drafter is not None
            self._watch.mark(0)
            self._drafter.absorb(pairs)
            self.graphs.run(bucket.draft_key, lambda: self._draft(bucket))
            self._watch.mark(1)
        if prompts is None:
            return self.graphs.run(bucket.verify_key, lambda: self._verify(bucket, None))
        return self.graphs.plain(lambda: self._verify(bucket, prompts))

    def _draft(self, bucket: Bucket) -> Tensor:
        """Fill the buffers of the trees and of the draft's numbers."""
        assert self._drafter is not None
        rows, stats = self._drafter.run(self._inputs.given(bucket), bucket)
        for name, buffer in vars(self._buffered(bucket)).items():
            buffer.copy_(getattr(rows, name))
        return self._drafted[: draft_size(bucket)].copy_(pack_draft(stats))

    def _verify(self, bucket: Bucket, prompts: Prompts | None) -> Tensor:
        given = self._inputs.given(bucket)
        rows = self._buffered(bucket) if bucket.nodes else single_rows(given.roots)
        walk, first = self._verification.run(given, rows, prompts, bucket)
        return pack_step(rows, walk, first, self._drafted[: draft_size(bucket)])

    def _buffered(self, bucket: Bucket) -> TreeRows:
        """The bucket's part of the tree buffers."""
        rows = self._rows
        parts = {f.name: getattr(rows, f.name)[: bucket.rows] for f in fields(rows)}
        return TreeRows(**{**parts, "starts": rows.starts[: bucket.requests + 1]})


def _tree_buffers(bucket: Bucket, max_nodes: int, device: torch.device) -> TreeRows:
    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    count = bucket.rows
    return TreeRows(
        whole(count).long(), whole(count), whole(count), whole(count), whole(count, 1 + max_nodes).bool(),
        whole(bucket.requests + 1),
    )  # fmt: skip
