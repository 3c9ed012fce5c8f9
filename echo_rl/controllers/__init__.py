"""Holds decision rules behind one interface, `echo_rl.contracts.Controller`; made by name with `make`."""

from __future__ import annotations

from typing import Any

__all__ = ["make", "names"]


def __getattr__(name: str) -> Any:
    """`registry`'s names, imported at first use: what only reads an arm's text loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'echo_rl.controllers' has no attribute '{name}'")
    from echo_rl.controllers import registry

    return getattr(registry, name)
