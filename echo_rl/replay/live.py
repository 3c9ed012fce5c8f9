"""Records the responses of a live engine to prompts, as a trace in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.trace import Trace
from echo_rl.runtime.environment import load_engine
from echo_rl.utils import terminal
from echo_rl.workloads.datasets import FileOptions, PromptSet
from echo_rl.workloads.requests import chat_requests, fitting

MAX_NEW_TOKENS = 96
"""The most tokens of a recorded response where nobody says otherwise."""


def record_prompts(
    config: EngineConfig,
    chosen: PromptSet,
    params: SamplingParams,
    options: RecordOptions,
    folder: Path,
    half: bool,
    console: Console,
) -> Trace:
    """Writes ``trace.safetensors`` into the folder, and the parts so far beside it.

    Request n samples with the seed of `params` plus n. With `half`, log-probabilities are kept in 16 bits. Says which
    prompts don't fit the engine's context. Raises what `Engine.load`, `fitting` and `record` raise.
    """
    engine, environment = load_engine(replace(config, max_expanded=max(config.max_expanded, options.expanded)))
    chosen = fitting(engine, chosen, params.max_new_tokens, spare=options.depth)
    terminal.say(console, chosen.notes)
    requests = chat_requests(engine, chosen.prompts, lambda number: replace(params, seed=params.seed + number))
    provenance = f"{engine.config.model_source}, drafter {environment['drafter']}, {environment['dtype']}"
    eos = frozenset(engine.runner.target.arch.eos)
    trace = record(engine, requests, eos, options, folder / "parts", provenance, console)
    trace.save(folder / "trace.safetensors", half)
    return trace


def trace_of(config: EngineConfig, trace: Path | None, files: FileOptions, folder: Path, console: Console) -> Trace:
    """The trace at a path; or of responses to the prompts of files, recorded into the folder first where they are not
    yet; the packaged one where neither is given. Raises `ConfigError` where both are, and as `record_prompts`."""
    if not files.prompts:
        return Trace.of(trace)
    if trace is not None:
        raise ConfigError(f"--trace {trace} and --prompts are given; give one of them")
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    return record_prompts(config, files.load_files(), params, RecordOptions(), folder, False, console)
