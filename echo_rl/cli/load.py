"""``echo-rl load``: real requests at a server that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echo_rl.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from echo_rl.experiments.load.config import LoadConfig

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
    """What arrives: closed:N, poisson:RATE, bursty:LOW,HIGH,ON,OFF, ramp:LOW,HIGH,SECONDS or shift:SECONDS,N."""
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
    """Most requests sent at once; the others wait at the client, and their time counts."""
    suite: Literal["all", "mt_bench", "humaneval", "gsm8k"] = "all"
    """Which prompts; ``all`` takes the suites in turn."""
    max_tokens: int = 128
    """Most tokens a request."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of the arrivals, the prompts' order and of sampling."""
    speculation: Literal["on", "off"] = "on"
    """``off`` asks for plain decoding in every request; ``echo-rl serve`` only."""
    retry: int = 0
    """How often a request is sent again after 429 or 503, after the wait that the server asks for."""
    timeout: float = 600.0
    """Seconds after which a request counts as failed."""
    slo_ttft: float = 2.0
    """Seconds to the first token that count as good."""
    slo_tpot: float = 0.1
    """Seconds per output token that count as good."""
    extra: str = "{}"
    """More fields for every request, as a JSON object: ``'{"ignore_eos": true}'``."""
    out: Path = Path("results/load")
    """Where the blocks, the result and the plots go."""

    def run(self) -> int:
        from rich.console import Console

        from echo_rl.experiments.load import plots
        from echo_rl.experiments.load.run import Keys, run_load
        from echo_rl.workloads.datasets import load_prompts

        console, config = Console(), self.config()
        prompts = load_prompts(self.suite, seed=self.seed)
        keys = Keys(*map(key, (API_KEY, ADMIN_KEY)))
        result, done = run_load(config, prompts, self.out, keys, console)
        console.print(table(result, console.width))
        for line in remarks(result):
            console.print(line, highlight=False)
        paths = [self.out / "result.json", *plots.draw(config, done, self.out)]
        console.print("Written: " + ", ".join(map(str, paths)), soft_wrap=True)
        return 0

    def config(self) -> LoadConfig:
        """Raises `ConfigError`."""
        from echo_rl.experiments.load.config import LoadConfig
        from echo_rl.workloads.metrics import SLO

        return LoadConfig(
            urls=self.url,
            workloads=self.workloads,
            models=self.model,
            controllers=self.arms,
            blocks=self.blocks,
            seconds=30.0 if self.seconds is None and self.num_requests is None else self.seconds,
            requests=self.num_requests,
            max_concurrency=self.max_concurrency,
            suite=self.suite,
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
    """A key out of the environment, as a server reads its own. Raises `ConfigError` where no header can hold it."""
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


WIDE = 150
"""Terminal columns that the whole table needs."""


def table(result: Mapping[str, Any], width: int = WIDE) -> Table:
    """One row per workload and arm, workloads in sections; a narrow terminal gets the main columns only."""
    from rich.markup import escape
    from rich.table import Table

    compared = bool(result["overall"])
    title = f"Against {result['baseline']}, 95 % intervals over blocks" if compared else "95 % intervals over blocks"
    view = Table(title=escape(title), title_justify="left")
    view.add_column("workload")
    view.add_column("arm", overflow="fold")
    cells = result["cells"]
    rows = [_values(cell, compared, full=width >= WIDE) for cell in cells]
    for name in rows[0]:
        view.add_column(name, justify="right")
    for cell, values, following in zip(cells, rows, [*cells[1:], None], strict=True):
        last = following is None or following["workload"] != cell["workload"]
        texts = map(escape, (cell["workload"], cell["arm"], *values.values()))
        view.add_row(*texts, end_section=last)
    return view


def _values(cell: Mapping[str, Any], compared: bool, full: bool) -> dict[str, str]:
    from echo_rl.utils.statistics import Interval

    values = {"tokens/s": Interval(**cell["rates"]["tokens_per_second"]).text(1)}
    if compared:
        ratio = cell["ratios"].get(cell["headline"])
        values["ratio"] = Interval(**ratio).text(2, "x") if ratio else "1"
    for name in ("ttft", "tpot", "itl", "e2e") if full else ("ttft", "tpot"):
        values[f"{name.upper()} ms p50/p95/p99"] = _milliseconds(cell["latency"][name])
    if full:
        values["requests/s"] = f"{cell['requests_per_second']:.2f}"
        if cell["goodput"] is not None:
            values["good/s"] = f"{cell['goodput']:.2f}"
    return {**values, "failed": str(sum(cell["errors"].values()))}


def _milliseconds(latency: Mapping[str, float] | None) -> str:
    return "/".join(f"{1000 * latency[key]:.0f}" for key in ("p50", "p95", "p99")) if latency else "-"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What the table leaves out: overall ratios, unequal outputs, errors by kind, what the client itself cost."""
    from echo_rl.utils.statistics import Interval

    cells = result["cells"]
    lines = [
        f"{arm} over {result['baseline']}, all workloads: {Interval(**ratio).text(2, 'x')}"
        for arm, ratio in result["overall"].items()
    ]
    for cell in cells:
        where, outputs = f"{cell['arm']}, {cell['workload']}", cell["outputs"]
        if outputs and outputs["differing"]:
            lines.append(f"{where}: {outputs['differing']} of {outputs['requests']} outputs differ")
        if cell["errors"]:
            lines.append(f"{where}: " + ", ".join(f"{count} x {kind}" for kind, count in cell["errors"].items()))
    share = max(cell["client_cpu_share"] for cell in cells)
    each = max(cell["client_cpu_seconds_per_chunk"] for cell in cells)
    return [*lines, f"This client took at most {share:.1%} of a core, {1e6 * each:.0f} us a chunk."]
