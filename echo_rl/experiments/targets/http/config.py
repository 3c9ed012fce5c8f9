"""Describes what a load test sends where. A pure description: nothing here runs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.experiments.plan import Run, check_blocks, schedule
from echo_rl.experiments.targets.http.drive import Ends
from echo_rl.workloads.arrivals import Workload, parse
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.metrics import SLO


@dataclass(frozen=True)
class ServerArm:
    """One arm: a server, a model there, and who decides the speculation."""

    url: str
    model: str | None
    """None: the first that the server lists."""
    controller: str | None
    """None: whichever is in force."""


@dataclass(frozen=True)
class LoadConfig:
    """Every combination of urls, models and controllers is an arm; the first is the baseline."""

    urls: tuple[str, ...]
    workloads: tuple[str, ...]
    models: tuple[str, ...] = ()
    controllers: tuple[str, ...] = ()
    blocks: int = 4
    seconds: float | None = 30.0
    """A block's length; what is in flight at its end is given up."""
    requests: int | None = None
    """Requests a block, all of them awaited; with `seconds` too, whichever ends first."""
    max_concurrency: int | None = None
    """Most requests sent at once; the others wait here, and their time counts."""
    suite: str = "all"
    temperature: float = 0.0
    seed: int = 0
    """The seed of the arrivals, of the prompts' order and of sampling."""
    max_tokens: int = 128
    speculate: bool = True
    """False: every request asks for plain decoding, an extension of ``echo-rl serve``."""
    retry: int = 0
    """Times that a request is sent again after 429 or 503, after the wait that the server asks for."""
    timeout: float = 600.0
    """Seconds after which a request counts as failed."""
    slo: SLO | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of every request's body, as they are."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigError("a load test needs the URL of a server")
        cap = 1 if self.max_concurrency is None else self.max_concurrency
        if self.retry < 0 or self.timeout <= 0 or cap < 1:
            raise ConfigError(
                f"retry is {self.retry}, timeout {self.timeout}, max_concurrency {self.max_concurrency}; "
                "give at least 0, more than 0 and at least 1"
            )
        assert self.runs and self.ends and self.params(0)  # they raise what is wrong with their parts

    @property
    def servers(self) -> dict[str, ServerArm]:
        """The arms by their labels, which say what tells an arm from the others."""
        found = {}
        for url, model, controller in product(self.urls, self.models or (None,), self.controllers or (None,)):
            parts = (controller, model if len(self.models) > 1 else None, url if len(self.urls) > 1 else None)
            found[" ".join(filter(None, parts)) or url] = ServerArm(url, model, controller)
        return found

    @property
    def runs(self) -> list[Run]:
        """All runs in their order. Raises `ConfigError` where there is nothing to run, or two arms are the same."""
        count = len(self.urls) * max(1, len(self.models)) * max(1, len(self.controllers))
        if len(self.servers) < count:
            raise ConfigError("two arms are the same; give each URL, model and controller once")
        check_blocks(tuple(self.servers), self.workloads, self.blocks)
        return schedule(tuple(self.servers), dict.fromkeys(self.workloads, self.blocks))

    @property
    def ends(self) -> Ends:
        return Ends(self.seconds, self.requests)

    def params(self, number: int) -> SamplingParams:
        """The sampling of the request with this number."""
        return SamplingParams(self.temperature, seed=self.seed + number, max_new_tokens=self.max_tokens)

    def requests_for(self, prompts: Sequence[Prompt]) -> list[Request]:
        """One a prompt, without tokens: a server makes them. Prompt ids are unique within a suite."""
        return [
            Request(f"{prompt.suite}/{prompt.id}", (), self.params_of(prompt, number), speculate=self.speculate)
            for number, prompt in enumerate(prompts)
        ]

    def params_of(self, prompt: Prompt, number: int) -> SamplingParams:
        """The sampling of a prompt, for as many tokens as its source gives where it gives them."""
        return replace(self.params(number), max_new_tokens=prompt.length(self.max_tokens))

    def workload(self, text: str, prompts: Sequence[Prompt]) -> Workload:
        """Raises `ConfigError` on one that can't be read."""
        return parse(text, dict.fromkeys(prompt.suite for prompt in prompts))
