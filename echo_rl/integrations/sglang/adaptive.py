"""Runs chains of a decided length through SGLang's own ``--speculative-adaptive`` (top-k 1, CUDA graphs).

SGLang asks an `AdaptiveSpecPolicy` for the number of draft steps before every decode step and tells it what
was accepted. `ChainPolicy` is one whose answers come from `PluginState`; `hooks` puts it in the place of SGLang's
own, and its candidate steps in the place of those that SGLang sizes its memory by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.settings import Shape
from echo_rl.integrations.sglang.state import PluginState

PARAMS = "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams"
CANDIDATES = "sglang.srt.speculative.adaptive_spec_params.resolve_candidate_steps_from_config"
CREATE_WORKER = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"

Hook = tuple[str, Any, str]
"""A target's dotted name, the hook and the name of its HookType."""


class ChainPolicy:
    """Answers SGLang's adaptive controller by `state`, which a subclass sets. Raises `ConfigError`."""

    state: ClassVar[PluginState]

    def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
        from sglang.srt.runtime_context import get_parallel, max_speculative_num_draft_tokens

        self.start(initial_steps, cfg_path, get_parallel(), max_speculative_num_draft_tokens())

    def start(self, initial_steps: int, cfg_path: str | None, parallel: Any, sized_for: int | None) -> None:
        """`sized_for` is the most rows a request that SGLang has reserved memory for."""
        refuse_file(cfg_path)
        launch = self.state.config.launch
        if initial_steps != launch.steps or (sized_for or 0) < launch.width:
            raise ConfigError(
                f"SGLang is sized for {initial_steps} steps and {sized_for} rows a request, the shapes need "
                f"{launch.steps} and {launch.width}; {self.state.remedy()}"
            )
        self._shapes: dict[int, Shape] = {shape.steps: shape for shape in self.state.config.choices}
        self._graph_sizes: list[int] | None = None
        self.state.bind(parallel, top_k=1)

    @property
    def candidate_steps(self) -> list[int]:
        return candidate_steps(self.state)

    def set_cuda_graph_bs(self, cuda_graph_bs: Sequence[int] | None) -> None:
        self._graph_sizes = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def get_steps_for_batch(self, batch_size: int) -> int:
        return self.state.config.choices[self.state.decide(batch_size).shape].steps

    def on_verify_complete(self, num_correct_drafts_per_req: Sequence[int], batch_size: int) -> None:
        """Reports a step. Never asks for a switch: `get_steps_for_batch` decides before each step anyway."""
        self.state.complete(num_correct_drafts_per_req, batch_size)

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """Returns the captured batch sizes that a shape can run at; None without CUDA graphs."""
        sizes = self._graph_sizes
        return None if sizes is None else reachable(self._shapes[step], sizes)


def candidate_steps(state: PluginState) -> list[int]:
    return sorted(shape.steps for shape in state.config.choices)


def reachable(shape: Shape, sizes: Sequence[int]) -> list[int]:
    """Returns the sizes that batches within a shape's limit are padded to."""
    limit = shape.max_batch
    if limit is None:
        return list(sizes)
    last = next((size for size in sizes if size >= limit), None)
    return [size for size in sizes if last is None or size <= last]


def refuse_file(cfg_path: str | None) -> None:
    if cfg_path is not None:
        raise ConfigError("the steps come from ECHO_RL_CONFIG; leave out --speculative-adaptive-config")


def hooks(state: PluginState) -> tuple[Hook, ...]:
    """Returns the hooks to register."""

    def candidates(cfg_path: str | None = None) -> list[int]:
        refuse_file(cfg_path)
        return candidate_steps(state)

    def create_worker(original: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
        from sglang.srt.runtime_context import get_spec

        if not get_spec().speculative_adaptive:  # SGLang switches it off with no more than a warning
            raise ConfigError(f"SGLang runs without --speculative-adaptive (its log says why); {state.remedy()}")
        return original(algorithm, server_args)

    policy = type("AdaptiveSpeculativeParams", (ChainPolicy,), {"state": state})
    return (
        (PARAMS, policy, "REPLACE"),
        (CANDIDATES, candidates, "REPLACE"),
        (CREATE_WORKER, create_worker, "AROUND"),
    )
