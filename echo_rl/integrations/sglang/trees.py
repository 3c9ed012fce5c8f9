"""Runs trees of a decided size: a batch-wide budget by width buckets, and ECHO's gates on the device.

SGLang verifies the same number of rows for every request of a batch, and captures a CUDA graph for each
(steps, width) ahead of time. So a plan's budget becomes the largest prepared `Shape` whose nodes over the
whole batch fit it, and a step switches between prepared states (`tree_worker`).

A gate stops a request where its best path is unlikely. SGLang drafts for all requests alike, so `weaken`
scales the probabilities below the stop by a power of two: what is verified is then the request's
likeliest nodes above the stop, wider there, and below it only what is left over. No value travels to the
state, and since the gates' thresholds live in a tensor, captured graphs read what `Gating.set` last wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.adaptive import CREATE_WORKER, Hook, reachable
from echo_rl.integrations.sglang.settings import Shape
from echo_rl.integrations.sglang.state import PluginState

if TYPE_CHECKING:
    from torch import Tensor

DRAFT_FORWARD = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft_forward"
SELECT = "sglang.srt.speculative.eagle_worker_v2.select_top_k_tokens"
RESERVE = "sglang.srt.mem_cache.allocation_sizing.get_alloc_len_per_decode"

STOPPED = 2.0**-24
"""Scales what lies below a gate that stopped its request: far below every path that matters, and a power of
two, so that among the scaled nodes the order, and parents before children, stay exact."""


def weaken(child_probs: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """`child_probs`, scaled by `STOPPED` for requests whose best path is below the gate.

    `child_probs` [B * F, C]: the next level's probabilities; `scores` [B, F]: path probabilities of the level
    just drafted; `threshold`: a scalar tensor, 0 for no gate. A request stopped once stays stopped, since
    everything below it is scaled, and isn't scaled again.
    """
    best = scores.amax(dim=1)  # [B]
    stopped = (best < threshold) & (best >= STOPPED)
    factor = stopped.to(child_probs.dtype) * (STOPPED - 1.0) + 1.0
    rows = child_probs.shape[0] // scores.shape[0]
    return child_probs * factor.repeat_interleave(rows).unsqueeze(1)


class Gating:
    """Holds the gates' thresholds on the device, and whether the code that now runs drafts under them."""

    def __init__(self) -> None:
        self._thresholds: Tensor | None = None  # [levels]
        self._values: tuple[float, ...] = ()
        self._drafting = False

    def place(self, levels: int, device: Any) -> None:
        """Makes the thresholds, which must exist before a graph is captured."""
        import torch

        self._thresholds = torch.zeros(levels, device=device)
        self._values = (0.0,) * levels

    def set(self, gates: Sequence[float]) -> None:
        """Sets the coming step's thresholds by depth; depths past the last have none. Fills only what changed."""
        assert self._thresholds is not None, "place comes first"
        values = (*gates, *[0.0] * (len(self._values) - len(gates)))[: len(self._values)]
        for depth, (old, new) in enumerate(zip(self._values, values, strict=True)):
            if old != new:
                self._thresholds[depth].fill_(new)
        self._values = values

    def draft_forward(self, original: Callable[..., Any], worker: Any, forward_batch: Any) -> Any:
        """Is an AROUND hook: drafting of the hooked worker class, and of nothing else, is gated."""
        self._drafting = self._thresholds is not None
        try:
            return original(worker, forward_batch)
        finally:
            self._drafting = False

    def select(
        self, original: Callable[..., Any], i: int, topk_p: Tensor, topk_index: Tensor, hidden_states: Tensor,
        scores: Tensor, topk: int,
    ) -> Any:  # fmt: skip
        """Is the AROUND hook of the choice of level `i`; the gate at depth i - 1 comes before it."""
        if self._drafting and self._thresholds is not None and 0 < i <= len(self._thresholds):
            topk_p = weaken(topk_p, scores, self._thresholds[i - 1])
        return original(i, topk_p, topk_index, hidden_states, scores, topk)


class KVReserve:
    """Keeps SGLang's KV reserve at the launch shape's.

    SGLang computes it from the steps in use, but reserves before the step's shape is chosen: after a
    shallow step a deep one would draft into slots that nobody reserved.
    """

    def __init__(self) -> None:
        self._most = 0

    def __call__(self, original: Callable[[], int]) -> int:
        self._most = max(self._most, original())
        return self._most


def tree_worker(base: Any, state: PluginState, gating: Gating) -> Any:
    """Makes a subclass of SGLang's EAGLE worker that prepares every shape and switches between them."""

    class TreeWorker(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            from sglang.srt.runtime_context import get_parallel, get_spec

            check_launch(state, get_spec())
            super().__init__(*args, **kwargs)
            state.bind(get_parallel(), top_k=self.topk)
            gating.place(state.config.launch.steps, self.device)
            self._echo_states: list[Any] = []

        def init_cuda_graphs(self) -> None:
            super().init_cuda_graphs()
            with drafting_contexts(self._draft_worker):
                self._echo_states = [self._prepare(shape) for shape in state.config.choices]

        def _prepare(self, shape: Shape) -> Any:
            if shape == state.config.launch:
                return launch_state(self)
            sizes = captured_sizes()
            return self.build_adaptive_runtime_state(
                speculative_num_steps=shape.steps,
                speculative_num_draft_tokens=shape.width,
                cuda_graph_bs=None if sizes is None else reachable(shape, sizes),
            )

        def activate_step_by_batch(self, batch_size: int) -> None:
            decision = state.decide(batch_size)
            gating.set(decision.gates)
            self.apply_runtime_state(self._echo_states[decision.shape])

        def apply_runtime_state(self, runtime_state: Any) -> None:
            """Applies a state by SGLang's own swap, which compares steps alone and would ignore a change of width."""
            now = (self.speculative_num_steps, self.speculative_num_draft_tokens)
            if now == (runtime_state.speculative_num_steps, runtime_state.speculative_num_draft_tokens):
                return
            self.speculative_num_steps: int = -1  # unlike any state's
            super().apply_runtime_state(runtime_state)

        def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
            state.complete(num_correct_drafts_per_req, batch_size)

    TreeWorker.__name__ = TreeWorker.__qualname__ = f"Echo{base.__name__}"
    return TreeWorker


UNSWAPPABLE = ("enable_two_batch_overlap", "enable_pdmux")
"""Server arguments under which SGLang refuses its own adaptive mode, whose swap of states this is."""


def require_swaps(server_args: Any) -> None:
    """Raises `ConfigError` where SGLang's swap of states would leave something behind."""
    for option in UNSWAPPABLE:
        if getattr(server_args, option, False):
            raise ConfigError(f"SGLang can't change shapes under --{option.replace('_', '-')}; start it without")


def check_launch(state: PluginState, spec: Any) -> None:
    """Raises `ConfigError` unless SGLang was started with the largest shape: it only ever goes down from there."""
    launch, top_k = state.config.launch, spec.speculative_eagle_topk or 1
    started = (spec.speculative_num_steps, spec.speculative_num_draft_tokens)
    if spec.speculative_adaptive or top_k < 2 or started != (launch.steps, launch.width):
        raise ConfigError(
            f"SGLang was started with top-k {top_k}, {started[0]} steps and {started[1]} draft tokens"
            f"{', adaptive' if spec.speculative_adaptive else ''}; {state.remedy()}"
        )
    for shape in state.config.choices:
        pool = top_k + (shape.steps - 1) * top_k**2 if shape.steps else 0
        if shape.nodes > pool:
            raise ConfigError(
                f"a shape of width {shape.width} needs {shape.nodes} candidates, {shape.steps} steps at top-k {top_k} "
                f"draft {pool}; make it narrower or deeper"
            )


@contextmanager
def drafting_contexts(draft_worker: Any) -> Iterator[None]:
    """Enters the contexts under which SGLang builds the states of its draft worker."""
    from sglang.srt.speculative import eagle_worker_v2 as stock

    with ExitStack() as stack:
        stack.enter_context(stock.draft_tp_context(draft_worker.parallel_layout))
        stack.enter_context(stock.speculative_moe_backend_context())
        stack.enter_context(stock.speculative_moe_a2a_backend_context())
        yield


def captured_sizes() -> list[int] | None:
    """Returns the batch sizes that SGLang captures decode graphs for; None where it captures none."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.speculative.eagle_worker_v2 import check_cuda_graph_backend

    if check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return None
    return sorted(get_exec().graph.cuda_graph_bs_decode)


def launch_state(worker: Any) -> Any:
    """Returns the state that SGLang itself has built for the shape it was started with."""
    from sglang.srt.speculative.adaptive_runtime_state import SpecRuntimeState

    draft, target = worker._draft_worker, worker._target_worker.model_runner
    return SpecRuntimeState(
        speculative_num_steps=worker.speculative_num_steps,
        speculative_num_draft_tokens=worker.speculative_num_draft_tokens,
        draft_attn_backend=draft.draft_attn_backend,
        cuda_graph_runner=draft.cuda_graph_runner,
        target_attn_backend=target.attn_backend,
        target_graph_runner=target.decode_cuda_graph_runner,
        draft_extend_attn_backend=draft.draft_extend_attn_backend,
        cuda_graph_runner_for_draft_extend=draft.cuda_graph_runner_for_draft_extend,
    )


def hooks(state: PluginState) -> tuple[Hook, ...]:
    """Returns the hooks to register."""
    gating = Gating()

    def create_worker(original: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
        from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

        require_swaps(server_args)
        worker = original(algorithm, server_args)
        if worker is not EAGLEWorkerV2:
            raise ConfigError(f"SGLang would draft with {worker.__name__}, not with EAGLE; {state.remedy()}")
        return tree_worker(worker, state, gating)

    return (
        (CREATE_WORKER, create_worker, "AROUND"),
        (DRAFT_FORWARD, gating.draft_forward, "AROUND"),
        (SELECT, gating.select, "AROUND"),
        (RESERVE, KVReserve(), "AROUND"),
    )
