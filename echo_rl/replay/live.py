"""Records the responses of a live engine to prompts, as a trace in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.trace import Trace
from echo_rl.runtime.environment import load_engine
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.requests import chat_requests


def record_prompts(
    config: EngineConfig,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    options: RecordOptions,
    folder: Path,
    half: bool,
    console: Console,
) -> Trace:
    """Writes ``trace.safetensors`` into the folder, and the parts so far beside it.

    Request n samples with the seed of `params` plus n. With `half`, log-probabilities are kept in 16 bits. Raises what
    `Engine.load` and `record` raise.
    """
    engine, environment = load_engine(replace(config, max_expanded=max(config.max_expanded, options.expanded)))
    requests = chat_requests(engine, prompts, lambda number: replace(params, seed=params.seed + number))
    provenance = f"{engine.config.model_source}, drafter {environment['drafter']}, {environment['dtype']}"
    eos = frozenset(engine.runner.target.arch.eos)
    trace = record(engine, requests, eos, options, folder / "parts", provenance, console)
    trace.save(folder / "trace.safetensors", half)
    return trace
