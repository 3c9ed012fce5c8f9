"""Runs a load test block by block, each arm on the same prompts, seeds and arrivals; goes on after an interruption."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from echo_rl.contracts import Request
from echo_rl.errors import ConfigError
from echo_rl.experiments.bench import run_missing
from echo_rl.experiments.load.client import Client, chat_body
from echo_rl.experiments.load.config import LoadConfig, Target
from echo_rl.experiments.load.connection import run_async
from echo_rl.experiments.load.drive import Ends, drive
from echo_rl.experiments.load.record import LoadRecord
from echo_rl.experiments.load.report import report
from echo_rl.experiments.plan import Trial, trials
from echo_rl.experiments.trials import Rotation, seed_of
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import ResultStore, write_json
from echo_rl.workloads.arrivals import Arrivals, closed
from echo_rl.workloads.datasets import Prompt

T = TypeVar("T")
WARMUP_REQUESTS = 4
WARMUP_TOKENS = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """What opens the servers. Never stored or shown."""

    api: str | None = None
    admin: str | None = None

    def __repr__(self) -> str:
        return "Keys(...)"


def run_load(
    config: LoadConfig, prompts: Sequence[Prompt], out: Path, keys: Keys, console: Console | None = None
) -> tuple[dict[str, Any], dict[Trial, LoadRecord]]:
    """Runs what `out` lacks, writes ``out/result.json``; returns its content and all records.

    A server whose controllers are compared gets back the one that it had. Raises `ConfigError` where a
    server can't be reached or serves no token, or where `out` holds another load test.
    """
    session = Session(config, prompts, keys)
    environment = machine(models=", ".join(session.models.values()))
    store: ResultStore[Trial, LoadRecord] = ResultStore.in_folder(out, config, environment, LoadRecord)
    try:
        done = run_missing(list(trials(config.trials)), store, session.run, console)
    finally:
        session.restore()
    result = report(config, session.workloads, done, environment)
    write_json(out / "result.json", result)
    return result, done


class Session:
    """Sends trials to their servers. Asks each server at once what it serves, so that a wrong URL is an error now."""

    def __init__(self, config: LoadConfig, prompts: Sequence[Prompt], keys: Keys) -> None:
        if not prompts:
            raise ConfigError("there are no prompts to send")
        self._config, self._keys = config, keys
        self._messages = {f"{prompt.suite}/{prompt.id}": prompt.messages for prompt in prompts}
        self._requests = config.requests_for(prompts)
        self.workloads = {text: config.workload(text, prompts) for text in config.workloads}
        self.models: dict[str, str] = {}
        """By URL, what the server lists first."""
        self.previous: dict[str, str] = {}
        """By URL, the controller to put back."""
        for url in config.urls:
            run_async(self._greet(url))

    def run(self, trial: Trial) -> LoadRecord:
        record = run_async(self._run(trial, self._config.targets[trial.arm]))
        if not record.served.output_tokens:
            raise ConfigError(f"no token came in {trial}{_most_frequent(record)}")
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
        if self._config.controllers:
            self.previous[url] = await self._with(url, lambda client: client.controller(self._keys.admin))

    async def _switch(self, url: str, spec: str) -> None:
        await self._with(url, lambda client: client.set_controller(spec, self._keys.admin))

    async def _with(self, url: str, use: Callable[[Client], Awaitable[T]]) -> T:
        client = Client(url, self._keys.api, self._config.timeout, self._config.retry)
        try:
            return await use(client)
        finally:
            client.close()

    async def _run(self, trial: Trial, target: Target) -> LoadRecord:
        return await self._with(target.url, lambda client: self._block(client, trial, target))

    async def _block(self, client: Client, trial: Trial, target: Target) -> LoadRecord:
        config = self._config
        if target.controller is not None:
            await client.set_controller(target.controller, self._keys.admin)

        def body(request: Request) -> bytes:
            messages = self._messages[request.id.rpartition("#")[0]]
            return chat_body(target.model or self.models[target.url], messages, request, config.extra)

        warm_up = Rotation([_short(request) for request in self._requests], config.seed)
        await drive(client, Arrivals(closed(WARMUP_REQUESTS), 0), warm_up, body, Ends(requests=WARMUP_REQUESTS))
        seed = seed_of(config.seed, trial.workload, trial.block)
        source = Rotation(self._requests, seed, f"{trial.block}.")
        arrivals = Arrivals(self.workloads[trial.workload], seed)
        return await drive(client, arrivals, source, body, config.ends, config.max_concurrency, trial.arm)


def _short(request: Request) -> Request:
    return replace(request, params=replace(request.params, max_new_tokens=WARMUP_TOKENS))


def _most_frequent(record: LoadRecord) -> str:
    errors = Counter(r.error for r in record.run.requests if r.error is not None).most_common(1)
    return f"; {errors[0][1]} times: {errors[0][0]}" if errors else "; give blocks more seconds"
