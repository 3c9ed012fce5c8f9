"""What the benchmarks of the server send: the same requests, through HTTP or to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.server.process import get
from echo_rl.contracts import Request
from echo_rl.experiments.targets.http.client import Client, chat_body
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.connection import Endpoint
from echo_rl.experiments.targets.http.drive import drive
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.experiments.targets.http.stream import Stream
from echo_rl.runtime.engine import Engine
from echo_rl.workloads.arrivals import Arrivals, closed
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.requests import Rotation

NOWHERE = "http://localhost"
"""Where the server would be, for a load that an engine of this process serves."""


def load_of(url: str, concurrency: int, requests: int, **more: Any) -> LoadConfig:
    """A closed load of so many requests, all awaited."""
    return LoadConfig((url,), (f"closed:{concurrency}",), seconds=None, requests=requests, **more)


class Visitor(Client):
    """A client that counts what it has under way, and sends the requests of a load."""

    def __init__(self, url: str, prompts: Sequence[Prompt]) -> None:
        super().__init__(url)
        self.begun = self.in_flight = 0
        self._messages = {f"{prompt.suite}/{prompt.id}": prompt.messages for prompt in prompts}
        self._prompts = prompts
        self._url = url

    async def complete(self, body: bytes, stream: Stream) -> None:
        self.begun, self.in_flight = self.begun + 1, self.in_flight + 1
        try:
            await super().complete(body, stream)
        finally:
            self.in_flight -= 1

    async def serve(self, config: LoadConfig, concurrency: int) -> LoadRecord:
        """The first so many requests that `config` makes of the prompts, in its order."""
        (model, *_) = await self.models()

        def body(request: Request) -> bytes:
            return chat_body(model, self._messages[name(request.id)], request, config.extra)

        source = Rotation(config.requests_for(self._prompts), config.seed)
        return await drive(self, Arrivals(closed(concurrency), config.seed), source, body, config.ends)

    async def ask(self, path: str) -> bytes:
        endpoint = Endpoint(self._url)
        try:
            return await get(endpoint, path)
        finally:
            await endpoint.close()


def name(request_id: str) -> str:
    """The id of a request without the count of its use."""
    return request_id.rpartition("#")[0]


def tokenised(engine: Engine, requests: Sequence[Request], prompts: Sequence[Prompt]) -> list[Request]:
    """The requests with their prompts' tokens."""
    pairs = zip(requests, prompts, strict=True)
    return [replace(request, prompt=engine.tokenizer.chat(list(prompt.messages))) for request, prompt in pairs]
