"""Lists every symbol of SGLang that the plugin uses, and checks its kind and parameters in the installed version.

SGLang has no stable interface at these places, so nothing is assumed: the table was recorded from the version
named in `RECORDED` and is compared by inspection before a hook is registered. `mentions` are names that the
symbol's own code must refer to: the plugin relies on *who calls whom*, which signatures don't show.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import CodeType
from typing import Any

from echo_rl.errors import EchoError

RECORDED = "0.5.23"
ROOT = "sglang.srt."


class ContractBroken(EchoError, RuntimeError):
    """The installed SGLang isn't what this plugin was written for."""


@dataclass(frozen=True)
class Symbol:
    """One name under ``sglang.srt``."""

    name: str
    kind: str
    """``function``, ``class``, ``enum``, ``property``, or the type of a constant."""
    parameters: tuple[str, ...] = ()
    """Its parameters; of a class those of its constructor."""
    mentions: tuple[str, ...] = ()
    """Names that its code refers to."""
    modes: tuple[str, ...] = ("adaptive", "trees")
    """The modes that use it."""


@dataclass(frozen=True)
class Finding:
    """A symbol compared; `problem` is empty where it is as recorded."""

    symbol: Symbol
    problem: str = ""


_ADAPTIVE, _TREES = ("adaptive",), ("trees",)
_SPEC, _WORKER = "speculative.", "speculative.eagle_worker_v2."

SYMBOLS: tuple[Symbol, ...] = (
    Symbol("plugins.load_plugins", "function", (), ("apply_hooks",)),
    Symbol("plugins.hook_registry.HookType", "enum"),
    Symbol("plugins.hook_registry.HookRegistry.register", "function", ("target", "hook", "hook_type", "source")),
    Symbol("plugins.hook_registry.HookRegistry.apply_hooks", "function"),
    Symbol("runtime_context.get_parallel", "function"),
    Symbol("runtime_context.get_spec", "function"),
    Symbol("runtime_context.max_speculative_num_draft_tokens", "function"),
    Symbol("managers.scheduler.Scheduler.run_batch", "function", ("self", "batch", "pp_proxy_tensors")),
    Symbol("managers.schedule_batch.Req.seqlen", "property"),
    Symbol("model_executor.forward_batch_info.ForwardMode.is_decode", "function", ("self",)),
    Symbol("model_executor.forward_batch_info.ForwardMode.is_extend", "function", ("self", "include_draft_extend_v2")),
    Symbol(
        "managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        "function", ("self",),
    ),
    Symbol(
        "managers.scheduler_components.pool_stats_observer.PoolStats.get_kv_token_stats", "function", ("self",)
    ),
    Symbol(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        "function", ("self", "result", "batch"), ("on_verify_complete_cpu", "num_correct_drafts_per_req_cpu"),
    ),
    Symbol(
        _SPEC + "spec_info.SpeculativeAlgorithm.create_worker", "function", ("self", "server_args"), ("EAGLEWorkerV2",)
    ),
    Symbol(_WORKER + "EAGLEWorkerV2", "class", ("server_args", "gpu_id", "nccl_port", "target_worker")),
    Symbol(
        _WORKER + "EAGLEWorkerV2.forward_batch_generation", "function",
        ("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
        ("activate_step_by_batch", "_build_trivial_verify_input", "speculative_num_steps"),
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.activate_step_by_batch", "function", ("self", "batch_size"), ("adaptive_controller",)
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.on_verify_complete_cpu", "function",
        ("self", "num_correct_drafts_per_req", "batch_size"), ("adaptive_controller",),
    ),
    Symbol(
        _SPEC + "adaptive_spec_params.AdaptiveSpeculativeParams", "class", ("initial_steps", "cfg_path"),
        modes=_ADAPTIVE,
    ),
    Symbol(
        _SPEC + "adaptive_spec_params.resolve_candidate_steps_from_config", "function", ("cfg_path",), modes=_ADAPTIVE
    ),
    Symbol(
        _SPEC + "adaptive_runtime_state.AdaptiveController", "class", ("worker", "policy"), modes=_ADAPTIVE
    ),
    Symbol(
        _SPEC + "adaptive_runtime_state.AdaptiveController.init_states", "function", ("self", "cuda_graph_bs"),
        ("set_cuda_graph_bs", "candidate_steps", "cuda_graph_bs_for_step", "build_adaptive_runtime_state"),
        modes=_ADAPTIVE,
    ),
    Symbol(
        _SPEC + "adaptive_runtime_state.AdaptiveController.activate_step_by_batch", "function", ("self", "batch_size"),
        ("get_steps_for_batch",), modes=_ADAPTIVE,
    ),
    Symbol(
        _SPEC + "adaptive_runtime_state.AdaptiveController.on_verify_complete", "function",
        ("self", "num_correct_drafts_per_req", "batch_size"), ("on_verify_complete", "_activate"), modes=_ADAPTIVE,
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.__init__", "function",
        ("self", "server_args", "gpu_id", "nccl_port", "target_worker"),
        ("AdaptiveSpeculativeParams", "AdaptiveController", "EagleDraftWorker", "_draft_worker"),
    ),
    Symbol(
        _SPEC + "spec_info.SpeculativeAlgorithm.resolve_max_speculative_num_draft_tokens", "function",
        ("self", "server_args"), ("resolve_candidate_steps_from_config",), modes=_ADAPTIVE,
    ),
    Symbol(
        _SPEC + "adaptive_runtime_state.SpecRuntimeState", "class",
        (
            *("speculative_num_steps", "speculative_num_draft_tokens", "draft_attn_backend", "cuda_graph_runner"),
            *("target_attn_backend", "target_graph_runner", "draft_extend_attn_backend"),
            "cuda_graph_runner_for_draft_extend",
        ),
        modes=_TREES,
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.init_cuda_graphs", "function", ("self",), ("SpecRuntimeState",), modes=_TREES
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.build_adaptive_runtime_state", "function",
        ("self", "speculative_num_steps", "speculative_num_draft_tokens", "cuda_graph_bs"),
        ("_override_worker_state", "SpecRuntimeState"), modes=_TREES,
    ),
    Symbol(
        _WORKER + "EAGLEWorkerV2.apply_runtime_state", "function", ("self", "state"),
        ("speculative_num_steps", "speculative_num_draft_tokens", "override"), modes=_TREES,
    ),
    Symbol(
        _WORKER + "EagleDraftWorker.draft_forward", "function", ("self", "forward_batch"),
        ("select_top_k_tokens", "organize_draft_results", "speculative_num_draft_tokens"), modes=_TREES,
    ),
    Symbol(
        _WORKER + "EagleDraftWorker.draft", "function", ("self", "batch", "with_topology"),
        ("draft_forward", "build_eagle_verify_input", "speculative_num_draft_tokens"), modes=_TREES,
    ),
    Symbol(
        _WORKER + "select_top_k_tokens", "function",
        ("i", "topk_p", "topk_index", "hidden_states", "scores", "topk"), modes=_TREES,
    ),
    Symbol(_WORKER + "draft_tp_context", "function", ("layout",), modes=_TREES),
    Symbol(_WORKER + "speculative_moe_backend_context", "function", modes=_TREES),
    Symbol(_WORKER + "speculative_moe_a2a_backend_context", "function", modes=_TREES),
    Symbol(_WORKER + "check_cuda_graph_backend", "function", ("phase", "backend"), modes=_TREES),
    Symbol("model_executor.cuda_graph_config.Phase.DECODE", "str", modes=_TREES),
    Symbol("model_executor.cuda_graph_config.Backend.DISABLED", "str", modes=_TREES),
    Symbol("runtime_context.get_exec", "function", modes=_TREES),
    Symbol("mem_cache.allocation_sizing.get_alloc_len_per_decode", "function", modes=_TREES),
)  # fmt: skip

Resolve = Callable[[str], Any]


def installed_version() -> str | None:
    """Returns SGLang's version, or None where it isn't installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check(mode: str | None = None, resolve: Resolve = pkgutil.resolve_name) -> tuple[Finding, ...]:
    """Compares every symbol (of one mode, or all) with what is installed. Never raises for a symbol."""
    return tuple(Finding(s, _problem(s, resolve)) for s in SYMBOLS if mode is None or mode in s.modes)


def require(mode: str, untested_version: bool = False, resolve: Resolve = pkgutil.resolve_name) -> None:
    """Raises `ContractBroken`, naming everything that differs and the remedy."""
    version = installed_version()
    if version != RECORDED and not untested_version:
        raise ContractBroken(
            f"SGLang {version} is installed, this plugin was written for {RECORDED}; install sglang=={RECORDED}, "
            "or set untested_version = true to run where all symbols match (`echo-rl sglang doctor` shows them)"
        )
    broken = [finding for finding in check(mode, resolve) if finding.problem]
    if broken:
        lines = "".join(f"\n  {ROOT}{finding.symbol.name}: {finding.problem}" for finding in broken)
        raise ContractBroken(f"SGLang {version} differs from {RECORDED}; install sglang=={RECORDED}:{lines}")


def _problem(symbol: Symbol, resolve: Resolve) -> str:
    try:
        found = resolve(ROOT + symbol.name)
    except Exception as error:  # whatever importing SGLang raises is a finding
        return f"missing ({type(error).__name__}: {error})"
    kind = _kind(found)
    if kind != symbol.kind:
        return f"is a {kind}, not a {symbol.kind}"
    if symbol.kind in ("function", "class"):
        parameters = tuple(inspect.signature(found).parameters)
        if parameters != symbol.parameters:
            return f"takes ({', '.join(parameters)}), not ({', '.join(symbol.parameters)})"
    absent = [name for name in symbol.mentions if name not in names_in(found)]
    return f"no longer refers to {', '.join(absent)}" if absent else ""


def _kind(found: Any) -> str:
    if inspect.isclass(found):
        return "enum" if hasattr(found, "__members__") else "class"
    if isinstance(found, property):
        return "property"
    return "function" if inspect.isroutine(found) else type(found).__name__


def names_in(function: Any) -> set[str]:
    """Returns every name that a function's code refers to, nested functions included."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(_names(code)) if code is not None else set()


def _names(code: CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_varnames, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
