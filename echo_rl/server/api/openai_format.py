"""OpenAI's two formats of a completion: text, and a chat's answer. Pure formatting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from echo_rl.contracts import TokenLogprob

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON lacks."""
Spell = Callable[[int], bytes]
"""Returns the bytes that a token stands for."""


class TextFormat:
    """The format of /v1/completions."""

    prefix = "cmpl-"
    """The prefix of completion ids."""
    kind, chunk_kind = "text_completion", "text_completion"
    """The ``object`` of whole answers and of chunks."""
    opening: str | None = None
    """The members of the first chunk of each choice; None sends no such chunk."""
    closing = '"text":""'
    """The members of a chunk beside a finish reason."""

    def delta(self, text: str) -> str:
        """Returns new text of a choice, as members of a JSON object."""
        return f'"text":{json.dumps(text)}'

    def choice(self, text: str) -> dict[str, Any]:
        """Returns the whole text of a choice, as members of a JSON object."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprob], spell: Spell, offsets: Sequence[int]) -> dict[str, Any]:
        """Returns log-probabilities; `offsets` are the lengths of the choice's text before each token."""
        names = [_name(spell(t.token)) for t in tokens]
        tops = [
            {name: _finite(t.logprob), **{_name(spell(i)): _finite(p) for i, p in reversed(t.top)}}
            for name, t in zip(names, tokens, strict=True)
        ]
        return {
            "tokens": names,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": tops if any(t.top for t in tokens) else None,
            "text_offset": list(offsets),
        }


class ChatFormat:
    """The format of /v1/chat/completions; its members are those of `TextFormat`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    opening: str | None = '"delta":{"role":"assistant","content":"","refusal":null}'
    closing = '"delta":{}'

    def delta(self, text: str) -> str:
        return f'"delta":{{"content":{json.dumps(text)}}}'

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokens: Sequence[TokenLogprob], spell: Spell, offsets: Sequence[int]) -> dict[str, Any]:
        content = [
            {**_alternative(spell, t.token, t.logprob), "top_logprobs": [_alternative(spell, *top) for top in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


CompletionFormat = TextFormat | ChatFormat


class ChunkWriter:
    """Writes the server-sent events of one stream from templates: no object is built for a chunk."""

    def __init__(self, form: CompletionFormat, id: str, created: int, model: str, usage: bool) -> None:
        self._form = form
        names = f'"id":{json.dumps(id)},"object":"{form.chunk_kind}","created":{created},"model":{json.dumps(model)}'
        self._start = f'data: {{{names},"choices":['
        self._end = '],"usage":null}\n\n' if usage else "]}\n\n"

    def opening(self, choices: int) -> bytes:
        """Returns the first chunk of every choice; nothing where the format has none."""
        first = self._form.opening
        return b"".join(self._chunk(i, first) for i in range(choices)) if first else b""

    def text(self, index: int, text: str, logprobs: dict[str, Any] | None) -> bytes:
        return self._chunk(index, self._form.delta(text), json.dumps(logprobs) if logprobs else "null")

    def finish(self, index: int, reason: str) -> bytes:
        return self._chunk(index, self._form.closing, reason=json.dumps(reason))

    def usage(self, usage: dict[str, int]) -> bytes:
        """Returns the chunk without choices that OpenAI sends last on request."""
        return f'{self._start}],"usage":{json.dumps(usage)}}}\n\n'.encode()

    def _chunk(self, index: int, members: str, logprobs: str = "null", reason: str = "null") -> bytes:
        choice = f'{{"index":{index},{members},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return f"{self._start}{choice}{self._end}".encode()


DONE = b"data: [DONE]\n\n"


def error_event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _alternative(spell: Spell, token: int, logprob: float) -> dict[str, Any]:
    spelled = spell(token)
    return {"token": _name(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}


def _name(spelled: bytes) -> str:
    """Returns a token's text; what is no whole character is written as OpenAI does it, ``bytes:\\xe2``."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
