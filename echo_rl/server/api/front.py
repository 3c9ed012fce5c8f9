"""Holds the state that all routes share, and turns a client's prompts into requests for the engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from echo_rl.contracts import Request
from echo_rl.server.api.errors import RETRY_SECONDS, ApiError
from echo_rl.server.api.limits import Admission
from echo_rl.server.api.metrics import Metrics
from echo_rl.server.api.schemas import Body
from echo_rl.server.client.engine_client import EngineClient
from echo_rl.server.config import ServerConfig
from echo_rl.server.messages import Ready

if TYPE_CHECKING:
    from echo_rl.runtime.tokenizer import Tokenizer

LONG_PROMPT = 4_096
"""Characters beyond which prompts are tokenised in a thread, so that streams go on meanwhile."""


@dataclass
class Front:
    """The state of one API server. `draining` is set once, when it shuts down."""

    engine_client: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    model: str
    """The name of the model that clients use."""
    metrics: Metrics
    admission: Admission
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def ready(self) -> bool:
        return self.engine_client.ready and not self.draining

    def loaded_engine(self) -> Ready:
        """Returns what the loaded engine is. Raises `ApiError` 503 where it serves nothing now."""
        if self.draining:
            raise _unavailable("the server is shutting down", int(self.config.drain_seconds) + 1)
        info = self.engine_client.ready_info
        if self.engine_client.dead:
            raise dead_engine()
        if not self.engine_client.ready or info is None:
            raise _unavailable("the engine is loading", RETRY_SECONDS)
        return info

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 unless this is the served model's name, or none."""
        if name is not None and name != self.model:
            raise ApiError(404, f"no such model here; this server has {self.model!r}", "model", "model_not_found")

    async def requests(self, id: str, body: Body) -> list[Request]:
        """Returns the n completions of each prompt, in the order of their index. Raises `ApiError` 400."""
        encode = partial(body.encode, self.tokenizer)
        prompts = await asyncio.to_thread(encode) if body.characters > LONG_PROMPT else encode()
        info = self.loaded_engine()
        requests: list[Request] = []
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, "the prompt is empty; give at least one token", "prompt")
            if max(prompt) >= info.vocab:
                raise ApiError(400, f"the prompt holds token ids outside [0, {info.vocab})", "prompt")
            for params in body.params(self._new_tokens(len(prompt), body, info.max_context)):
                request_id = f"{id}-{len(requests)}"
                requests.append(Request(request_id, prompt, params, body.speculation != "off", body.top_alternatives))
        return requests

    def _new_tokens(self, prompt: int, body: Body, context: int) -> int:
        """Returns the output tokens that a completion may have. Raises `ApiError` 400 on a prompt or limit too long."""
        longest, most = self.config.max_prompt_tokens, self.config.max_tokens
        if longest is not None and prompt > longest:
            raise ApiError(400, f"the prompt has {prompt} tokens, this server allows {longest}", "prompt")
        asked, left = body.limit, context - prompt
        if asked is not None and most is not None and asked > most:
            raise ApiError(400, f"max_tokens is {asked}, this server allows {most}", "max_tokens")
        if left < (asked or 1):
            raise ApiError(
                400,
                f"prompt ({prompt} tokens) and output ({asked or 1}) exceed the context of {context}; shorten one",
                "max_tokens" if left > 0 else "prompt",
                "context_length_exceeded",
            )
        bounds = (left, most, body.default_limit)
        return asked or min(bound for bound in bounds if bound is not None)


def dead_engine() -> ApiError:
    return ApiError(503, "the engine is dead and is not started again", code="dead")


def _unavailable(message: str, seconds: int) -> ApiError:
    return ApiError(503, f"{message}; try again later", code="unavailable", headers={"Retry-After": str(seconds)})
