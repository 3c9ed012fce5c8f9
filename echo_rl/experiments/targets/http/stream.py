"""A streamed completion as the client sees it: server-sent events, and when which part of the text came."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from echo_rl.experiments.targets.http.connection import ProtocolError

DONE = b"[DONE]"


class Events:
    """Cuts bytes into the data of server-sent events, however they are split over calls."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data.clear()
        return found


class Stream:
    """One chat completion while it comes in. `clock` tells when."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.texts: list[str] = []
        self.times: list[float] = []
        """The time at which each text came."""
        self.finish_reason: str | None = None
        self.error: str | None = None
        """``kind: message``; a request with an error has failed, whatever text came before."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        """The tokens that the server counted; 0 where it doesn't say, as of an answer that was cut."""
        self._clock = clock
        self._events = Events()

    def feed(self, piece: bytes) -> None:
        """Raises `ProtocolError` where this isn't a stream of chat completion chunks."""
        now = self._clock()
        for data in self._events.feed(piece):
            if data != DONE:
                try:
                    self._take(json.loads(data), now)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    raise ProtocolError(f"not a completion chunk: {data[:200]!r}") from error

    def _take(self, chunk: dict[str, Any], now: float) -> None:
        if chunk.get("error"):
            self.error = f"stream error: {message(chunk)}"
            return
        if usage := chunk.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if text := delta.get("content") or delta.get("reasoning_content"):
                self.texts.append(text)
                self.times.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def token_times(self, density: float = 0.0) -> list[float]:
        """The time of each token: as many as the server says, else `density` a character, else one a chunk."""
        sizes = [len(text) for text in self.texts]
        return spread(self.times, sizes, self.completion_tokens or round(density * sum(sizes)) or len(sizes))


def spread(times: Sequence[float], sizes: Sequence[int], total: int) -> list[float]:
    """`total` tokens over chunks in proportion to their characters, at least one each where there are enough.

    A server says how many tokens a whole answer has, not a chunk. The first and the last token are
    never misplaced, so TTFT and TPOT are exact; gaps between tokens are exact on average.
    """
    characters, seen = sum(sizes), 0
    placed: list[float] = []
    for index, (time, size) in enumerate(zip(times, sizes, strict=True)):
        seen += size
        most = max(1, total - (len(sizes) - 1 - index))
        upto = min(max(round(total * seen / characters), len(placed) + 1), most)
        placed += [time] * (upto - len(placed))
    return placed


def message(body: Any) -> str:
    """The message of an error in OpenAI's format, in one line."""
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
