"""``/metrics``: what requests cost their clients, and what the engine does (`step_metrics`).

Names are SGLang's where the meaning is equal: what it calls a request is one completion here, of which an HTTP request
may ask for several.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from echo_rl.server.api.model_metrics import MODEL, ModelMetrics
from echo_rl.server.api.request_stats import CUT_OFF, RequestStats
from echo_rl.server.api.step_metrics import StepMetrics
from echo_rl.server.client.engine_client import EngineClient

FIRST_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 100, 200, 400)
BETWEEN_BUCKETS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 1, 2, 5)
WHOLE_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 100, 200, 400, 600, 1200)


class Metrics:
    """Everything that Prometheus may ask of one server."""

    def __init__(self, model: str, client: EngineClient) -> None:
        metrics = ModelMetrics(model)
        self.registry, self._client, self._steps = metrics.registry, client, StepMetrics(metrics)
        client.on_stats(self._steps.step)
        self.ttft = metrics.histogram("sglang:time_to_first_token_seconds", "Time to first token.", FIRST_BUCKETS)
        self._itl = metrics.histogram("sglang:inter_token_latency_seconds", "Time between tokens.", BETWEEN_BUCKETS)
        self._tpot = metrics.histogram(
            "sglang:time_per_output_token_seconds", "A request's time per token after the first.", BETWEEN_BUCKETS
        )
        self._e2e = metrics.histogram("sglang:e2e_request_latency_seconds", "Time of whole requests.", WHOLE_BUCKETS)
        self.prompt_tokens = metrics.counter("sglang:prompt_tokens_total", "Prompt tokens.")
        self.generated_tokens = metrics.counter("sglang:generation_tokens_total", "Generated tokens.")
        self._requests = metrics.counter("sglang:num_requests_total", "Requests that were served to their end.")
        self._aborted = metrics.counter("sglang:num_aborted_requests_total", "Requests that were cancelled or failed.")
        self._answers = metrics.counters("echo_rl:http_requests_total", "HTTP requests.", "route", "status")
        self._restarts = metrics.gauge("echo_rl:core_restarts", "Times that the engine was started again.")
        self.registry.register(ClientTotals(model, client))

    def more_tokens(self, count: int, seconds: float) -> None:
        """Counts tokens that came together, so long after those before; each with its share, as SGLang does it."""
        for _ in range(count):
            self._itl.observe(seconds / count)

    def completed(self, seconds: float, tpot: float | None) -> None:
        """Counts a completion that was served to its end, `seconds` after its HTTP request came."""
        self._requests.inc()
        self._e2e.observe(seconds)
        if tpot is not None:
            self._tpot.observe(tpot)

    def request_done(self, stats: RequestStats) -> None:
        """Counts one HTTP request, whatever became of it, and its completions that were cut off."""
        self._answers(stats.route, stats.status).inc()
        self._aborted.inc(sum(reason in CUT_OFF for reason in stats.finish_reasons))

    def text(self) -> bytes:
        """Returns the exposition, with gauges brought up to date."""
        self._steps.refresh(time.time(), idle=not self._client.in_flight)
        self._restarts.set(self._client.restarts)
        return generate_latest(self.registry)


class ClientTotals(Collector):
    """Exposes the totals that an engine client keeps over restarts of its core."""

    def __init__(self, model: str, client: EngineClient) -> None:
        self._model, self._client = model, client

    def collect(self) -> Iterator[CounterMetricFamily]:
        client = self._client
        yield self._family("echo_rl:fallbacks_total", "Decisions that ECHO took over.", client.fallbacks, "cause")
        yield self._family(
            "echo_rl:controller_rollbacks_total",
            "Times that a new controller failed its trial and the one before it came back.",
            {"": client.rollbacks},
        )
        yield self._family(
            "echo_rl:served_total",
            "Steps served on the device, steps left to the host by cause (eager:...), graphs (graphs:...).",
            client.serving,
            "way",
        )

    def _family(self, name: str, text: str, totals: Mapping[str, int], *label: str) -> CounterMetricFamily:
        """Returns a counter with one sample for each total, whose key is the value of the label if there is one."""
        family = CounterMetricFamily(name, text, labels=[MODEL, *label])
        for key, total in totals.items():
            family.add_metric([self._model, key][: 1 + len(label)], total)
        return family
