"""Asks a server for chat completions, its models, and which controller decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from echo_rl.contracts import Request
from echo_rl.errors import ConfigError
from echo_rl.experiments.targets.http.connection import OK, Answer, Endpoint, ProtocolError
from echo_rl.experiments.targets.http.stream import Stream, message
from echo_rl.workloads.datasets import Message

BUSY = (429, 503)
"""Answers that mean "later"."""
WAIT = 1.0
"""Seconds before another try where the server names none."""


def chat_body(model: str, messages: tuple[Message, ...], request: Request, extra: Mapping[str, Any]) -> bytes:
    """The JSON of a streamed chat completion; `extra` fields override."""
    params = request.params
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
    }
    if params.ignore_eos:
        body["ignore_eos"] = True
    if not request.speculate:
        body["speculation"] = "off"
    return json.dumps({**body, **extra}).encode()


class Client:
    """One server. Belongs to one event loop; close it there."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0, retry: int = 0) -> None:
        self.url, self.timeout, self.retry = url, timeout, retry
        self.retries = 0
        """Requests sent again after a busy answer."""
        self._endpoint = Endpoint(url, key)

    async def complete(self, body: bytes, stream: Stream) -> None:
        """Fills `stream` until the answer is over; whatever goes wrong is its `error`, never raised."""
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._ask(body, stream)
        except TimeoutError:
            stream.error = f"timeout: no end within {self.timeout:g} s"
        except ProtocolError as error:
            stream.error = f"protocol: {error}"
        except OSError as error:
            if stream.finish_reason is None:
                stream.error = f"connection: {error}"
        else:
            if answer.status != OK:
                stream.error = f"http {answer.status}: {_said(answer)}"
            elif stream.finish_reason is None and stream.error is None:
                stream.error = "protocol: the answer ended without a finish reason"

    async def _ask(self, body: bytes, stream: Stream) -> Answer:
        for _ in range(self.retry):
            answer = await self._endpoint.fetch("POST", "/v1/chat/completions", body, stream.feed)
            if answer.status not in BUSY:
                return answer
            self.retries += 1
            await asyncio.sleep(WAIT if answer.retry_after is None else answer.retry_after)
        return await self._endpoint.fetch("POST", "/v1/chat/completions", body, stream.feed)

    async def models(self) -> list[str]:
        """Raises `ConfigError` where the server can't be reached or doesn't say."""
        found = await self._call("GET", "/v1/models")
        return [str(model["id"]) for model in found.get("data", ())]

    async def context(self, model: str | None) -> int | None:
        """The most tokens of a prompt and its answer, as vLLM, SGLang and ``echo-rl serve`` tell them, or None."""
        found = (await self._call("GET", "/v1/models")).get("data", ())
        told = [each.get("max_model_len") for each in found if model in (None, each.get("id"))]
        return told[0] if told and isinstance(told[0], int) else None

    async def controller(self, key: str | None) -> str:
        """The controller in force. Raises `ConfigError`, as where this isn't an ``echo-rl serve``."""
        return str((await self._call("GET", "/admin/controller", key=key)).get("controller", ""))

    async def set_controller(self, spec: str, key: str | None) -> None:
        """Also as the server shows it. Raises `ConfigError` where the server refuses it."""
        await self._call("PUT", "/admin/controller", {"controller": spec}, key)

    async def _call(self, method: str, path: str, body: Any = None, key: str | None = None) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._endpoint.fetch(method, path, data, key=key)
        except (OSError, ProtocolError) as error:
            raise ConfigError(f"{self.url} gives no answer ({error}); is the server running?") from error
        if answer.status != OK:
            raise ConfigError(f"{self.url} refuses {method} {path} with {answer.status}: {_said(answer)}")
        found = _json(answer)
        if not isinstance(found, dict):
            raise ConfigError(f"{self.url} answers {method} {path} with something else than a JSON object")
        return found

    async def close(self) -> None:
        await self._endpoint.close()


def _said(answer: Answer) -> str:
    return message(_json(answer))


def _json(answer: Answer) -> Any:
    try:
        return json.loads(answer.body)
    except ValueError:
        return answer.body.decode(errors="replace")
