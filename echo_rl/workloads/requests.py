"""Makes requests out of prompts: chat messages through the tokenizer of the engine that will serve them."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from echo_rl.contracts import Backend, Request, SamplingParams
from echo_rl.errors import ConfigError, RequestError
from echo_rl.workloads.arrival_trace import ArrivalTrace
from echo_rl.workloads.datasets import Message, Prompt, PromptSet


class ChatTokenizer(Protocol):
    def chat(self, messages: list[Message]) -> tuple[int, ...]: ...


class BenchEngine(Backend, Protocol):
    """A serving engine that can turn chat messages into prompt ids."""

    @property
    def max_context(self) -> int:
        """The most tokens of a prompt together with its answer."""
        ...

    @property
    def tokenizer(self) -> ChatTokenizer: ...


def chat_requests(
    engine: BenchEngine, prompts: Iterable[Prompt], params: Callable[[int], SamplingParams], first: int = 0
) -> list[Request]:
    """One request a prompt, numbered from `first`; `params(n)` are those of request n, a prompt's own length aside."""

    def sampled(prompt: Prompt, number: int) -> SamplingParams:
        chosen = params(number)
        return replace(chosen, max_new_tokens=prompt.length(chosen.max_new_tokens))

    return [
        Request(f"{prompt.suite}/{prompt.id}#{n}", engine.tokenizer.chat(list(prompt.messages)), sampled(prompt, n))
        for n, prompt in enumerate(prompts, first)
    ]


def fitting(
    engine: BenchEngine, chosen: PromptSet, max_new_tokens: int, most: int | None = None, spare: int = 0
) -> PromptSet:
    """The first `most` prompts that fit the engine's context together with answers of `max_new_tokens` (or of their own
    lengths) and `spare` tokens more; its notes say what was passed over.

    Raises `ConfigError` where none fits or the engine's chat template refuses all.
    """
    kept: list[Prompt] = []
    long, refused, reason = 0, 0, ""
    for prompt in chosen.prompts:
        if len(kept) == most:
            break
        try:
            tokens = len(engine.tokenizer.chat(list(prompt.messages)))
        except RequestError as error:
            refused, reason = refused + 1, str(error)
            continue
        if tokens + prompt.length(max_new_tokens) + spare > engine.max_context:
            long += 1
        else:
            kept.append(prompt)
    notes = []
    if long:
        notes.append(
            f"prompts left out: {long} (longer, with their answers, than the context of {engine.max_context} tokens)"
        )
    if refused:
        notes.append(f"prompts left out: {refused} ({reason})")
    if not kept:
        raise ConfigError("; ".join(("no prompt can be served", *notes)))
    return replace(chosen, prompts=kept, notes=(*chosen.notes, *notes))


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


class TraceRequests:
    """The request of each arrival of a trace in their order, with the lengths that it had, as far as a context allows.

    A prompt is the last so many tokens of as many prompts as it takes, the seed's next ones; an answer has exactly its
    tokens. The seed is that of the arrivals, so that both begin at the same place of the trace.
    """

    def __init__(
        self, trace: ArrivalTrace, requests: Sequence[Request], context: int, seed: int, tag: str = ""
    ) -> None:
        self._order, self._context = trace.order(seed), context
        self._prompts = Rotation(requests, seed, tag)

    def __call__(self, suite: str) -> Request:
        """Raises `ConfigError` where there is no prompt to make it of."""
        arrival = next(self._order)[1].clipped(self._context)
        last = self._prompts(suite)
        tokens = last.prompt
        while len(tokens) < arrival.prompt_tokens:
            tokens = self._prompts(suite).prompt + tokens
        params = replace(last.params, max_new_tokens=arrival.output_tokens, ignore_eos=True, stop=())
        return replace(last, prompt=tokens[-arrival.prompt_tokens :], params=params)


def seed_of(*parts: object) -> int:
    """A seed of its own for each combination of parts."""
    return zlib.crc32("/".join(map(str, parts)).encode())
