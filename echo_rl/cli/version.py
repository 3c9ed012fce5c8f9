"""``echo-rl version``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """Print the version."""

    def run(self) -> int:
        from echo_rl import __version__

        print(__version__)
        return 0
