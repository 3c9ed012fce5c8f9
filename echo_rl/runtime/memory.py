"""Names the setting that asked for more memory than there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from echo_rl.errors import ConfigError


@contextmanager
def allocating(what: str, setting: str) -> Iterator[None]:
    """Raises `ConfigError` where the block can't have the memory that it asks for."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:  # torch has no error of its own for the CPU's memory
        reason = (str(e).splitlines() or ["out of memory"])[0]
        raise ConfigError(f"there is no memory for {what} ({reason}); lower {setting}") from e
