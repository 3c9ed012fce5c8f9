"""``echo-rl load``: real requests at a server that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echo_rl.cli.options import PromptFlags
from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets import PromptOptions

if TYPE_CHECKING:
    from echo_rl.experiments.targets.http.config import LoadConfig

API_KEY, ADMIN_KEY = "ECHO_RL_API_KEY", "ECHO_RL_ADMIN_KEY"


@dataclass(frozen=True)
class Load:
    """Measure a server under load, or compare servers, models or controllers; rerun it to go on where it stopped.

    Takes keys from ECHO_RL_API_KEY and ECHO_RL_ADMIN_KEY. Several arms serve the same prompts, seeds and
    arrivals in interleaved blocks. Writes ``result.json`` and a plot for each workload.
    """

    url: tuple[str, ...] = ("http://127.0.0.1:8000",)
    """Servers, with or without ``/v1``."""
    workloads: tuple[str, ...] = ("closed:1", "closed:4", "closed:16")
    """How requests arrive: closed:N, poisson:RATE, bursty:LOW,HIGH,ON,OFF, ramp:LOW,HIGH,SECONDS, shift:SECONDS,N or
    trace:FILE,SPEED."""
    arrivals: tuple[Path, ...] = ()
    """Traces of arrivals to serve instead: times, prompt and answer lengths, in Mooncake's or Azure's form or as plain
    CSV or JSON lines. ``--workloads trace:FILE,2`` is such a trace at twice its speed."""
    arms: tuple[str, ...] = ()
    """Controllers to switch the server between, the first being the baseline; ``echo-rl serve`` only, whose admin
    key this needs. ``ppo:checkpoint=NAME`` takes a checkpoint of the server. None: whichever is in force."""
    model: tuple[str, ...] = ()
    """Models by their served names; the first that the server lists where none is named."""
    blocks: int = 4
    """Blocks a workload and arm; intervals come from resampling them."""
    seconds: float | None = None
    """Seconds a block, after which what is in flight is given up; 30 where ``--num-requests`` is not given either."""
    num_requests: int | None = None
    """Requests a block, all of them awaited."""
    max_concurrency: int | None = None
    """The most requests sent at once; the others wait at the client, and their time counts."""
    max_tokens: int = 128
    """The most tokens of an answer whose length its prompt's file doesn't give."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """The seed of the arrivals, the prompts' order and of sampling."""
    speculation: Literal["on", "off"] = "on"
    """``off`` asks for plain decoding in every request; ``echo-rl serve`` only."""
    retry: int = 0
    """The most times that a request is sent again after 429 or 503, after the wait that the server asks for."""
    timeout: float = 600.0
    """Seconds after which a request counts as failed."""
    slo_ttft: float = 2.0
    """Seconds to the first token that count as good."""
    slo_tpot: float = 0.1
    """Seconds per output token that count as good."""
    extra: str = "{}"
    """More fields for every request, as a JSON object: ``'{"ignore_eos": true}'``."""
    out: Path = Path("results/load")
    """The folder of the blocks, the result and the plots."""
    data: PromptFlags = field(default_factory=PromptOptions)

    def run(self) -> int:
        from echo_rl.experiments.load import run_load
        from echo_rl.experiments.report import plots_load, tables
        from echo_rl.experiments.targets.http.target import Keys
        from echo_rl.utils import terminal

        console, chosen = terminal.console(), self.data.load(self.seed)
        config = replace(self.config(), suite=chosen.suite)
        terminal.say(console, chosen.notes)
        keys = Keys(*map(key, (API_KEY, ADMIN_KEY)))
        result, done = run_load(config, chosen.prompts, self.out, keys, console, chosen.facts)
        console.print(tables.load(result, console.width))
        for line in tables.remarks(result):
            console.print(line, highlight=False)
        paths = [self.out / "result.json", *plots_load.draw(config, done, self.out)]
        console.print("Written: " + ", ".join(map(str, paths)), soft_wrap=True)
        return 0

    def config(self) -> LoadConfig:
        """Raises `ConfigError`."""
        from echo_rl.experiments.targets.http.config import LoadConfig
        from echo_rl.workloads.metrics import SLO

        return LoadConfig(
            urls=self.url,
            workloads=tuple(f"trace:{path}" for path in self.arrivals) or self.workloads,
            models=self.model,
            controllers=self.arms,
            blocks=self.blocks,
            seconds=30.0 if self.seconds is None and self.num_requests is None else self.seconds,
            requests=self.num_requests,
            max_concurrency=self.max_concurrency,
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=self.max_tokens,
            speculate=self.speculation == "on",
            retry=self.retry,
            timeout=self.timeout,
            slo=SLO(self.slo_ttft, self.slo_tpot),
            extra=_object(self.extra),
        )


def key(variable: str) -> str | None:
    """Returns a key of the environment, as a server reads its own. Raises `ConfigError` where no header can hold it."""
    text = os.environ.get(variable, "").strip()
    if not text.isprintable():
        raise ConfigError(f"the key in ${variable} holds a control character; write it on one line")
    return text or None


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"extra is no JSON ({error}); write it like '{{\"ignore_eos\": true}}'") from error
    if not isinstance(found, dict):
        raise ConfigError(f"extra is {text}; give a JSON object")
    return found
