"""``echo-rl weights fetch``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Weights:
    """Fetch the default model (SmolLM2-135M-Instruct) into the cache, once."""

    action: tyro.conf.Positional[Literal["fetch"]]
    """``fetch`` downloads, checks and converts the weights, then prints their folder."""

    def run(self) -> int:
        from echo_rl.runtime.models.default_model import fetch_smollm2

        print(fetch_smollm2(progress=lambda message: print(message, file=sys.stderr)))
        return 0
