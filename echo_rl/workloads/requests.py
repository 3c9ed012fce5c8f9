"""Requests out of prompts: chat messages through the tokenizer of the engine that will serve them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from echo_rl.contracts import Backend, Request, SamplingParams
from echo_rl.workloads.datasets import Message, Prompt


class ChatTokenizer(Protocol):
    def chat(self, messages: list[Message]) -> tuple[int, ...]: ...


class BenchEngine(Backend, Protocol):
    """A serving engine that can turn chat messages into prompt ids."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...


def chat_requests(
    engine: BenchEngine, prompts: Iterable[Prompt], params: Callable[[int], SamplingParams], first: int = 0
) -> list[Request]:
    """One request a prompt, numbered from `first`; `params(n)` are those of request n."""
    return [
        Request(f"{prompt.suite}/{prompt.id}#{n}", engine.tokenizer.chat(list(prompt.messages)), params(n))
        for n, prompt in enumerate(prompts, first)
    ]
