"""The live engine as the target of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError
from echo_rl.experiments.targets.backend import Target, facts
from echo_rl.replay.trace import Trace
from echo_rl.runtime.environment import load_engine


def live_target(config: EngineConfig, trace: Trace, console: Console) -> Target:
    """A new engine on the requests of a trace. Raises as `check_recorded_by` and `Engine.load`."""
    with console.status("loading the model"):
        engine, environment = load_engine(config)
    check_recorded_by(config.model, environment, trace.provenance, console)
    told = {**environment, **facts(trace)}
    return Target("live", engine, trace.requests(), environment=told, context=engine.max_context)


def check_recorded_by(model: str, environment: Mapping[str, str], provenance: str, console: Console) -> None:
    """Raises `ConfigError` where another model recorded the trace, whose prompts mean nothing to this one.

    Says so where another drafter did.
    """
    recorder, told, rest = provenance.partition(", drafter ")
    if not told:  # not by `echo-rl record`
        return
    if Path(recorder).name.partition("@")[0] != Path(model).name:  # the Hub's have a commit behind the name
        raise ConfigError(
            f"the trace was recorded from {recorder}, the engine serves {model}; record one of it "
            f"(echo-rl record --model {model}) and give it as --trace"
        )
    if rest.partition(", ")[0] != environment["drafter"]:
        console.print("note: another drafter recorded the trace; a replay of it says nothing about this engine's")
