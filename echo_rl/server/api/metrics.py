"""``/metrics``: what requests cost their clients, and what the engine does (`step_metrics`).

SGLang's names where the meaning is equal: what it calls a request is one completion here, of which an HTTP request
may ask for several.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, generate_latest

from echo_rl.server.api.meters import Meters
from echo_rl.server.api.request_stats import CUT_OFF, RequestStats
from echo_rl.server.api.step_metrics import StepMetrics
from echo_rl.server.messages import StepStats

FIRST_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 100, 200, 400)
BETWEEN_BUCKETS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 1, 2, 5)
WHOLE_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 100, 200, 400, 600, 1200)


class Metrics:
    """Everything that Prometheus may ask of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        meters = Meters(self.registry, model)
        self._steps = StepMetrics(self.registry, model)
        self._ttft = meters.histogram("sglang:time_to_first_token_seconds", "Time to first token.", FIRST_BUCKETS)
        self._itl = meters.histogram("sglang:inter_token_latency_seconds", "Time between tokens.", BETWEEN_BUCKETS)
        self._tpot = meters.histogram(
            "sglang:time_per_output_token_seconds", "A request's time per token after the first.", BETWEEN_BUCKETS
        )
        self._e2e = meters.histogram("sglang:e2e_request_latency_seconds", "Time of whole requests.", WHOLE_BUCKETS)
        self._prompt = meters.counter("sglang:prompt_tokens_total", "Prompt tokens.")
        self._generated = meters.counter("sglang:generation_tokens_total", "Generated tokens.")
        self._requests = meters.counter("sglang:num_requests_total", "Requests that were served to their end.")
        self._aborted = meters.counter("sglang:num_aborted_requests_total", "Requests that were cancelled or failed.")
        self._answers = meters.counter("echo_rl:http_requests_total", "HTTP requests.", "route", "status")
        self._restarts = meters.gauge("echo_rl:core_restarts", "Times that the engine was started again.")

    def prompt(self, tokens: int) -> None:
        self._prompt.add(tokens)

    def generated(self, tokens: int) -> None:
        self._generated.add(tokens)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def more_tokens(self, count: int, seconds: float) -> None:
        """`count` tokens came together, so long after those before; each counts with its share, as SGLang does it."""
        self._itl.observe(seconds / count, count)

    def completed(self, seconds: float, tpot: float | None) -> None:
        """Count a completion that was served to its end, `seconds` after its HTTP request came."""
        self._requests.add(1)
        self._e2e.observe(seconds)
        if tpot is not None:
            self._tpot.observe(tpot)

    def request_done(self, trail: RequestStats) -> None:
        """Count one HTTP request, whatever became of it, and its completions that were cut off."""
        self._answers.add(1, trail.route, trail.status)
        self._aborted.add(sum(reason in CUT_OFF for reason in trail.finish_reasons))

    def step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self._steps.step(stats)

    def text(self, in_flight: int, restarts: int) -> bytes:
        """The exposition, with gauges brought up to date."""
        self._steps.refresh(time.time(), idle=not in_flight)
        self._restarts.value = restarts
        return generate_latest(self.registry)
