"""The prompts that are served: built-in suites out of published packages, and chat messages out of files of yours."""

from __future__ import annotations

from echo_rl.workloads.datasets.load import load_prompts
from echo_rl.workloads.datasets.options import FileOptions, PromptOptions, PromptSet
from echo_rl.workloads.datasets.prompt import Message, Prompt
from echo_rl.workloads.datasets.suites import MIX, SUITES, refuse_held_out

__all__ = [
    "MIX",
    "SUITES",
    "FileOptions",
    "Message",
    "Prompt",
    "PromptOptions",
    "PromptSet",
    "load_prompts",
    "refuse_held_out",
]
