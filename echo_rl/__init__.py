"""ECHO-RL: speculative decoding under one batch-wide node budget, with the budget decision as a policy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from echo_rl.env.registration import register_with_gymnasium

__version__ = "0.1.0"

_HOMES = {
    "Engine": ("echo_rl.runtime.engine", "Engine"),
    "EngineConfig": ("echo_rl.config", "EngineConfig"),
    "Request": ("echo_rl.contracts", "Request"),
    "SamplingParams": ("echo_rl.contracts", "SamplingParams"),
    "make_controller": ("echo_rl.controllers.registry", "make"),
    "register_envs": ("echo_rl.env.registration", "register_envs"),
    "serve": ("echo_rl.workloads.driver", "serve"),
}
__all__ = ["Engine", "EngineConfig", "Request", "SamplingParams", "make_controller", "register_envs", "serve"]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'echo_rl' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


register_with_gymnasium()
