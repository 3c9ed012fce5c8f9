"""Makes requests out of prompts: chat messages through the tokenizer of the engine that will serve them."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from echo_rl.contracts import Backend, Request, SamplingParams
from echo_rl.errors import ConfigError
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


class Rotation:
    """The next request of a suite, from a shuffled order that starts again at its end.

    Ids are told apart by `tag` and by how often the request came: the same use of the same request
    has the same id in every arm.
    """

    def __init__(self, requests: Sequence[Request], seed: int, tag: str = "") -> None:
        self._requests, self._seed, self._tag = requests, seed, tag
        self._orders: dict[str, list[Request]] = {}
        self._given: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()

    def __call__(self, suite: str) -> Request:
        """Raises `ConfigError` where there is no request of that suite ("" is any)."""
        if suite not in self._orders:
            self._orders[suite] = self._shuffled(suite)
        order = self._orders[suite]
        chosen = order[self._given[suite] % len(order)]
        self._given[suite] += 1
        self._uses[chosen.id] += 1
        return replace(chosen, id=f"{chosen.id}#{self._tag}{self._uses[chosen.id]}")

    def _shuffled(self, suite: str) -> list[Request]:
        chosen = [request for request in self._requests if suite in ("", request.id.split("/")[0])]
        if not chosen:
            raise ConfigError(f"there are no requests of the suite {suite!r}; choose another workload or other prompts")
        random.Random(f"{self._seed}/{suite}").shuffle(chosen)
        return chosen


def seed_of(*parts: object) -> int:
    """A seed of its own for each combination of parts."""
    return zlib.crc32("/".join(map(str, parts)).encode())
