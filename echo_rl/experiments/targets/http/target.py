"""Servers that speak OpenAI's API as the target of an experiment."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from echo_rl.contracts import Request
from echo_rl.errors import ConfigError
from echo_rl.experiments.plan import Run
from echo_rl.experiments.targets.http.client import Client, chat_body
from echo_rl.experiments.targets.http.config import LoadConfig, ServerArm
from echo_rl.experiments.targets.http.connection import run_async
from echo_rl.experiments.targets.http.drive import Ends, drive
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.experiments.targets.http.shaped import Counting, ShapedRequests, characters
from echo_rl.workloads.arrivals import Arrivals, closed
from echo_rl.workloads.datasets import Message, Prompt
from echo_rl.workloads.requests import Rotation, seed_of

T = TypeVar("T")
WARMUP_REQUESTS = 4
WARMUP_TOKENS = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """The keys that open the servers. They are never stored or shown."""

    api: str | None = None
    admin: str | None = None

    def __repr__(self) -> str:
        return "Keys(...)"


class HttpTarget:
    """Sends runs to their servers. Asks each server at once what it serves, so that a wrong URL is an error now."""

    def __init__(self, config: LoadConfig, prompts: Sequence[Prompt], keys: Keys) -> None:
        if not prompts:
            raise ConfigError("there are no prompts to send")
        self._config, self._keys = config, keys
        self._messages = {f"{prompt.suite}/{prompt.id}": prompt.messages for prompt in prompts}
        self._requests = config.requests_for(prompts)
        self.workloads = {text: config.workload(text, prompts) for text in config.workloads}
        self.models: dict[str, str] = {}
        """The model that each server (URL) lists first."""
        self.previous: dict[str, str] = {}
        """The controller of each server (URL) to put back."""
        self._counting: Counting | None = None  # the first server's; all arms are sent the same
        self._context: int | None = None  # the shortest of all servers, as far as they tell
        for url in config.urls:
            run_async(self._greet(url))

    @property
    def remarks(self) -> list[str]:
        """Says where a workload is not sent as it was recorded."""
        traces = {text: each.trace for text, each in self.workloads.items() if each.trace is not None}
        return [f"{text}: {remark}" for text, trace in traces.items() for remark in trace.remarks(self._context)]

    def run(self, run: Run) -> LoadRecord:
        arm = self._config.servers[run.arm]
        record = run_async(self._with(arm.url, lambda client: self._block(client, run, arm)))
        if not record.served.output_tokens:
            raise ConfigError(f"no token came in {run}{_most_frequent(record)}")
        return record

    def restore(self) -> None:
        """Puts back the controllers; where that fails, only says so: the measurements are safe."""
        for url, spec in self.previous.items():
            try:
                run_async(self._switch(url, spec))
            except ConfigError as error:
                log.warning("the controller %s is not put back: %s", spec, error)

    async def _greet(self, url: str) -> None:
        names = await self._with(url, lambda client: client.models())
        if not names and not self._config.models:
            raise ConfigError(f"{url} lists no model; name one with --model")
        self.models[url] = names[0] if names else self._config.models[0]
        told = await self._with(url, lambda client: client.context(self.models[url]))
        self._context = min((each for each in (self._context, told) if each), default=None)
        if self._config.controllers:
            self.previous[url] = await self._with(url, lambda client: client.controller(self._keys.admin))

    async def _switch(self, url: str, spec: str) -> None:
        await self._with(url, lambda client: client.set_controller(spec, self._keys.admin))

    async def _with(self, url: str, use: Callable[[Client], Awaitable[T]]) -> T:
        client = Client(url, self._keys.api, self._config.timeout, self._config.retry)
        try:
            return await use(client)
        finally:
            await client.close()

    async def _block(self, client: Client, run: Run, arm: ServerArm) -> LoadRecord:
        config = self._config
        if arm.controller is not None:
            await client.set_controller(arm.controller, self._keys.admin)

        shaped: dict[str, tuple[Message, ...]] = {}

        def body(request: Request) -> bytes:
            messages = shaped.pop(request.id, None) or self._messages[request.id.rpartition("#")[0]]
            return chat_body(arm.model or self.models[arm.url], messages, request, config.extra)

        few = (replace(request.params, max_new_tokens=WARMUP_TOKENS) for request in self._requests)
        short = [replace(request, params=params) for request, params in zip(self._requests, few, strict=True)]
        warm_up = Rotation(short, config.seed)
        first = await drive(client, Arrivals(closed(WARMUP_REQUESTS), 0), warm_up, body, Ends(requests=WARMUP_REQUESTS))
        workload, seed = self.workloads[run.workload], seed_of(config.seed, run.workload, run.block)
        source: Callable[[str], Request] = Rotation(self._requests, seed, f"{run.block}.")
        if workload.trace is not None:
            self._counting = self._counting or self._counted(first)
            source = made = ShapedRequests(
                workload.trace, self._requests, self._messages, self._counting, self._context, seed, f"{run.block}."
            )
            shaped = made.messages
        arrivals = Arrivals(workload, seed)
        return await drive(client, arrivals, source, body, config.ends, config.max_concurrency, run.arm)

    def _counted(self, first: LoadRecord) -> Counting:
        """How the server counts tokens, by its first answers. Raises `ConfigError` where it doesn't say."""
        told = {one.id.rpartition("#")[0]: one.prompt_tokens for one in first.run.requests if one.prompt_tokens}
        if not told:
            raise ConfigError("the server doesn't say how many tokens a prompt has, so none can be made of a length")
        return Counting.of([len(characters(self._messages[name])) for name in told], list(told.values()))


def _most_frequent(record: LoadRecord) -> str:
    errors = Counter(r.error for r in record.run.requests if r.error is not None).most_common(1)
    return f"; {errors[0][1]} times: {errors[0][0]}" if errors else "; give blocks more seconds"
