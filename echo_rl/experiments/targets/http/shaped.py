"""Shapes messages for a trace of arrivals: texts of about as many tokens as each request had.

A client has no tokenizer, so it learns from answers how a server counts: tokens are a line in the characters sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from echo_rl.contracts import Request
from echo_rl.workloads.arrival_trace import ArrivalTrace
from echo_rl.workloads.datasets import Message
from echo_rl.workloads.requests import Rotation

SPARE = 16
"""The part of a context, one in so many, that is left free, since a text has about as many tokens as it should."""
Messages = Mapping[str, Sequence[Message]]
"""The messages of each prompt, by the id of its request up to the last number sign."""


@dataclass(frozen=True)
class Counting:
    """Tokens that a server counts: ``fixed + per_character * characters``."""

    fixed: float
    per_character: float

    @classmethod
    def of(cls, characters: Sequence[int], tokens: Sequence[int]) -> Counting:
        """The line through what was counted; through the origin where that says nothing of a slope."""
        if len({*characters}) > 1:
            slope, fixed = np.polyfit(characters, tokens, 1)
            if slope > 0 and fixed >= 0:
                return cls(float(fixed), float(slope))
        return cls(0.0, sum(tokens) / max(1, sum(characters)) or 0.25)

    def characters(self, tokens: int) -> int:
        """How many characters have about so many tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.per_character))


class ShapedRequests:
    """The request of each arrival of a trace in their order, and in `messages` what it says, by its id.

    A text is the last characters of as many prompts as it takes, the seed's next ones. The server goes on to the whole
    length of the answer where it takes ``ignore_eos``, as vLLM, SGLang and ``echo-rl serve`` do.
    """

    def __init__(
        self,
        trace: ArrivalTrace,
        requests: Sequence[Request],
        said: Messages,
        counting: Counting,
        context: int | None,
        seed: int,
        tag: str,
    ) -> None:
        self._order, self._counting, self._said = trace.order(seed), counting, said
        self._context = context and context - context // SPARE
        self._prompts = Rotation(requests, seed, tag)
        self.messages: dict[str, tuple[Message, ...]] = {}

    def __call__(self, suite: str) -> Request:
        arrival = next(self._order)[1].clipped(self._context)
        wanted = self._counting.characters(arrival.prompt_tokens)
        last = self._prompts(suite)
        text = self._text(last)
        while len(text) < wanted:
            text = f"{self._text(self._prompts(suite))}\n\n{text}"
        self.messages[last.id] = ({"role": "user", "content": text[-wanted:]},)
        return replace(last, params=replace(last.params, max_new_tokens=arrival.output_tokens, ignore_eos=True))

    def _text(self, request: Request) -> str:
        return characters(self._said[request.id.rpartition("#")[0]])


def characters(messages: Sequence[Message]) -> str:
    """The texts of messages as one."""
    return "\n\n".join(message["content"] for message in messages)
