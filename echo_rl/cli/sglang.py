"""``echo-rl sglang``: the SGLang plugin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Doctor:
    """Compare the installed SGLang with what the plugin was written for; exits 1 where anything differs."""

    config: Path | None = None
    """A configuration file to check too; the one that ECHO_RL_CONFIG names by default."""

    def run(self) -> int:
        from echo_rl.integrations.sglang.doctor import examine, table
        from echo_rl.utils import terminal

        rows = examine(str(self.config) if self.config else None)
        console = terminal.console()
        console.print(table(rows, console.width))
        wrong = sum(not row.ok for row in rows)
        console.print(f"{wrong} of {len(rows)} checks failed." if wrong else f"All {len(rows)} checks passed.")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Example:
    """Print a configuration file to start from; save it, and name it in ECHO_RL_CONFIG."""

    def run(self) -> int:
        from echo_rl.integrations.sglang.settings import EXAMPLE

        print(EXAMPLE, end="")
        return 0


AnyCommand = Annotated[Doctor, tyro.conf.subcommand("doctor")] | Annotated[Example, tyro.conf.subcommand("example")]
