"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import tyro

from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams

EngineOptions = Annotated[EngineConfig, tyro.conf.arg(name="")]
"""Every engine setting as a flag of its own, without a prefix."""

SamplingOptions = Annotated[SamplingParams, tyro.conf.arg(name="")]
