"""What the clients of a soak send to a server, and how each kind of request may end."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from echo_rl.experiments.targets.http.connection import OK, Answer, Endpoint, ProtocolError
from echo_rl.experiments.targets.http.stream import DONE, Events

PATIENCE = 240.0
"""Seconds after which a request counts as lost. An engine that hangs is noticed after 60."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPTS = (
    "Name three uses of copper.",
    "Write a function that reverses a list.",
    "If a train covers 60 miles in 90 minutes, how fast is it?",
    "Tell me a short story about a lighthouse keeper and a storm.",
)
SPECS = ("none", "eagle3", "echo", "chain", "ppo", "tetris", "echo:max_depth=3")
BROKEN = (b"", b"{", b'{"messages": [', b"\xff\xfe\x00", b"[]", b"null", b'"text"', b"[" * 5000)
"""Bodies that are no JSON object."""
HELLO = [{"role": "user", "content": "Hello"}]
SENSELESS: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "robot", "content": "hello"}]},
    {"messages": HELLO, "temperature": -1},
    {"messages": HELLO, "max_tokens": 0},
    {"messages": HELLO, "n": 1000},
    {"messages": HELLO, "top_p": 2.0},
    {"messages": HELLO, "tools": [{"type": "function"}]},
    {"messages": HELLO, "model": "another"},
)
SERVED = frozenset({"finished", "busy 429", "busy 503", "failed"})
DISRUPTED = frozenset({"busy 503", "failed"})
ALLOWED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("chat", "several", "plain", "logprobs", "long"), SERVED),
    **dict.fromkeys(("leaver", "hasty"), SERVED | {"left"}),
    "malformed": frozenset({"refused 400"}),
    "senseless": frozenset({"refused 400", "refused 404", "busy 503"}),
    "oversized prompt": frozenset({"refused 400", "busy 429", "busy 503"}),
    "oversized body": frozenset({"refused 413", "broken"}),  # who does not stop writing is cut off
    "swap": frozenset({"done", "refused 400", *DISRUPTED}),  # 400 while an experiment runs
    "bad swap": frozenset({"refused 400"}),
    "experiment": frozenset({"done", "refused 400", "refused 409", *DISRUPTED}),
    "stop experiment": frozenset({"done", "refused 400", *DISRUPTED}),  # it may end by itself just then
    "stats": frozenset({"done", *DISRUPTED}),
    "scrape": frozenset({"done"}),
}
"""How a request of a kind may end. Before the server is told to end, anything else is a violation."""
WEIGHTS: Mapping[str, float] = {
    **{"chat": 8, "several": 2, "plain": 2, "logprobs": 1, "long": 1, "leaver": 4, "hasty": 2},
    **{"malformed": 1, "senseless": 1, "oversized prompt": 0.5, "oversized body": 0.5, "scrape": 0.5, "stats": 0.5},
}
COMPLETIONS = frozenset(("chat", "several", "plain", "logprobs", "long", "leaver", "hasty"))
ENGINE_GONE = ("the engine died", "the server stopped", "it is shutting down")
"""What a failed request may say: nothing else makes one fail."""


@dataclass(frozen=True)
class Size:
    """How large requests are."""

    context: int
    """The server's limit in tokens."""
    body: int
    """The server's limit in bytes."""
    tokens: int = 48
    """The most output tokens of a request."""


@dataclass
class ClientRequest:
    """One request and how it ended."""

    kind: str
    outcome: str = "lost"
    status: int = 0
    """0: no answer, not even the beginning of one, or the client did not wait for it."""
    detail: str = ""
    id: str | None = None
    """The server's id of it, where it was served to its end."""
    tokens: int = 0
    """Output tokens that the server counts."""
    texts: tuple[str, ...] = ()
    began: float = 0.0
    ended: float = 0.0
    """By `time.monotonic`, as is `began`."""
    asked: bytes = field(default=b"", repr=False)

    @property
    def fair(self) -> bool:
        excused = self.outcome != "failed" or any(words in self.detail for words in ENGINE_GONE)
        return self.outcome in ALLOWED[self.kind] and excused


class SoakClient:
    """Sends requests to one server; what it asks follows from `rng`."""

    def __init__(self, url: str, size: Size, rng: random.Random) -> None:
        self._url, self._size, self._rng = url, size, rng

    async def send(self, kind: str) -> ClientRequest:
        request = ClientRequest(kind, began=time.monotonic())
        endpoint = Endpoint(self._url)  # a connection of its own: none is idle long enough to be closed
        try:
            async with asyncio.timeout(PATIENCE):
                await self._make(request, endpoint)
        except TimeoutError:
            request.outcome, request.detail = "lost", f"no end within {PATIENCE:g} s"
        except (OSError, ProtocolError) as error:
            request.outcome, request.detail = "broken", f"{type(error).__name__}: {error}"
        finally:
            await endpoint.close()
            request.ended = time.monotonic()
        return request

    async def _make(self, request: ClientRequest, endpoint: Endpoint) -> None:
        method, path, body = self._request(request.kind)
        request.asked = body if len(body) <= self._size.body else b""
        raw = bytearray()
        asking = asyncio.ensure_future(endpoint.fetch(method, path, body, raw.extend))
        try:
            if request.kind in ("leaver", "hasty"):
                await self._stay(request.kind, asking, raw)
            else:
                await asyncio.wait((asking,))
            if asking.done():
                request.status = OK if raw else 0  # an answer may break off
                judge(request, asking.result(), bytes(raw))
            else:
                request.outcome = "left"
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _stay(self, kind: str, asking: asyncio.Future[Answer], raw: bytearray) -> None:
        """Waits until so many events have come, or so much time is over."""
        events = self._rng.randint(1, 12) if kind == "leaver" else 10**9
        end = time.monotonic() + (PATIENCE if kind == "leaver" else self._rng.uniform(0.05, 0.5))
        while not asking.done() and raw.count(b"\n\n") < events and time.monotonic() < end:
            await asyncio.wait((asking,), timeout=0.02)

    def _request(self, kind: str) -> tuple[str, str, bytes]:
        rng, size = self._rng, self._size
        match kind:
            case "malformed":
                return "POST", CHAT, rng.choice(BROKEN)
            case "senseless":
                return _post(CHAT, rng.choice(SENSELESS))
            case "oversized prompt":
                return _post(CHAT, self._chat("hello " * 2 * size.context))
            case "oversized body":
                return _post(CHAT, self._chat("x" * size.body))
            case "swap":
                return "PUT", "/admin/controller", json.dumps({"controller": rng.choice(SPECS)}).encode()
            case "bad swap":
                spec = rng.choice(("nonsense", "ppo:path=/etc", "oracle", "echo:nonsense=1"))
                return "PUT", "/admin/controller", json.dumps({"controller": spec}).encode()
            case "experiment":
                control, treatment = rng.sample(SPECS, 2)
                arms = {"control": control, "treatment": treatment}
                return _post("/admin/ab", {**arms, "block_seconds": 0.4, "blocks": 4, "harm": 0.0})
            case "stop experiment":
                return "DELETE", "/admin/ab", b""
            case "stats":
                return "GET", "/admin/stats", b""
            case "scrape":
                return "GET", "/metrics", b""
        return self._completion(kind)

    def _completion(self, kind: str) -> tuple[str, str, bytes]:
        rng, prompt = self._rng, self._rng.choice(PROMPTS)
        match kind:
            case "several":
                return _post(TEXT, {"prompt": prompt, "n": 3, "temperature": 0.9, "seed": 7, "max_tokens": 24})
            case "plain":
                return _post(CHAT, self._chat(prompt, stream=False, speculation="off"))
            case "logprobs":
                return _post(CHAT, self._chat(prompt, logprobs=True, top_logprobs=3))
            case "long":
                text = (prompt + " ") * (self._size.context // (2 * len(prompt)))
                return _post(CHAT, self._chat(text, max_tokens=8))
            case "hasty":
                return _post(CHAT, self._chat(prompt, stream=False))
        return _post(CHAT, self._chat(prompt, temperature=rng.choice((0.0, 0.8)), stop=rng.choice((None, "e t"))))

    def _chat(self, prompt: str, **more: Any) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._rng.choice((8, self._size.tokens // 2, self._size.tokens)),
            "temperature": 0.0,
            "seed": 11,
            "stream": True,
            **more,
        }
        return {**body, "stream_options": {"include_usage": True}} if body["stream"] else body


def _post(path: str, body: Mapping[str, Any]) -> tuple[str, str, bytes]:
    return "POST", path, json.dumps(body).encode()


# ----------------------------------------------------------------------------- outcomes


def judge(request: ClientRequest, answer: Answer, raw: bytes) -> None:
    """Writes the outcome of an answer that is complete as far as HTTP goes."""
    request.status = answer.status
    if answer.status == OK:
        took: Callable[[ClientRequest, bytes], None] = _stream if raw.startswith(b"data:") else _whole
        took(request, raw) if request.kind in COMPLETIONS else _done(request)
        return
    error = _object(bytes(answer.body)).get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        request.outcome, request.detail = "broken", f"{answer.status} without an error object"
        return
    request.detail = error["message"]
    if answer.status == 429 or error["code"] == "unavailable":
        request.outcome = f"busy {answer.status}" if answer.retry_after else "busy without Retry-After"
    else:
        request.outcome = "failed" if answer.status >= 500 else f"refused {answer.status}"


def _done(request: ClientRequest) -> None:
    request.outcome = "done"


def _stream(request: ClientRequest, raw: bytes) -> None:
    *data, last = Events().feed(raw)
    chunks = [_object(each) for each in data]
    failed = [chunk["error"]["message"] for chunk in chunks if "error" in chunk]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    request.texts = ("".join(choice["delta"].get("content") or "" for choice in choices),)
    if last != DONE:
        request.outcome, request.detail = "broken", "the stream ends without [DONE]"
    elif failed:
        request.outcome, request.detail = "failed", failed[0]
    elif not any(choice["finish_reason"] for choice in choices):
        request.outcome, request.detail = "broken", "the stream ends without a finish reason"
    else:
        _finished(request, chunks[0]["id"], chunks[-1]["usage"])


def _whole(request: ClientRequest, raw: bytes) -> None:
    body = _object(raw)
    choices = body.get("choices", ())
    if not choices or not all(choice["finish_reason"] for choice in choices):
        request.outcome, request.detail = "broken", "the answer has no finish reason"
        return
    request.texts = tuple(choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices)
    _finished(request, body["id"], body["usage"])


def _finished(request: ClientRequest, id: str, usage: Mapping[str, int]) -> None:
    request.outcome, request.id, request.tokens = "finished", id.partition("-")[2], usage["completion_tokens"]


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
