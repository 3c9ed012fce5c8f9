"""``echo-rl train``: parsed only when it is asked for, since its options are those of the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from echo_rl.learning.train import TrainConfig, train


@dataclass(frozen=True)
class Train:
    """Train a policy on replayed servers; rerun it to go on where it stopped."""

    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> int:
        from echo_rl.utils import terminal

        console = terminal.console()
        done = train(self.options, console)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in done.best.items() if "/" not in name)
        console.print(f"{done.policy}: {scores}; on {done.machine}", soft_wrap=True)
        return 0
