"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import tyro

from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams
from echo_rl.workloads.datasets import FileOptions, PromptOptions

EngineOptions = Annotated[EngineConfig, tyro.conf.arg(name="")]
"""Every engine setting as a flag of its own, without a prefix."""

PromptFlags = Annotated[PromptOptions, tyro.conf.arg(name="")]
"""The prompts that are served: a built-in suite or files."""

RECORDED = "recorded"
"""The folder, in that of a command's results, of the responses to prompts of files that it records first."""

FileFlags = Annotated[FileOptions, tyro.conf.arg(name="")]
"""Prompts out of files, where no built-in suite may be named."""

SamplingOptions = Annotated[SamplingParams, tyro.conf.arg(name="")]
