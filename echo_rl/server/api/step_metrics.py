"""Metrics of the engine's steps: load, throughput and speculation.

Names are SGLang's where the meaning is equal. Its count of proposed tokens assumes a fixed tree, so the true counts
stand under ``echo_rl:spec_*``.
"""

from __future__ import annotations

from collections import deque

from prometheus_client import Gauge

from echo_rl.server.api.model_metrics import MODEL, ModelMetrics
from echo_rl.server.messages import StepStats
from echo_rl.workloads.metrics import PHASES

WINDOW_SECONDS = 5.0
"""Seconds that rates are measured over."""
PLAN = {
    "budget": "Nodes that the last plan allowed over the batch; 0 is plain decoding.",
    "depth": "Levels of the last plan.",
    "width": "Width of the last plan.",
}
STAGES = ("drafted", "verified", "accepted")
STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class StepMetrics:
    """Counts every step; rates are over the last `WINDOW_SECONDS`."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._model = metrics.model
        self._recent: deque[StepStats] = deque()
        self._last: StepStats | None = None
        self._running = metrics.gauge("sglang:num_running_reqs", "Running requests.")
        self._queued = metrics.gauge("sglang:num_queue_reqs", "Requests in the waiting queue.")
        self._kv = metrics.gauge("sglang:token_usage", "Share of the KV cache in use.")
        self._throughput = metrics.gauge("sglang:gen_throughput", "Generated tokens a second, of the last seconds.")
        self._length = metrics.gauge(
            "sglang:spec_accept_length",
            "Mean tokens a request gets from a pass that speculates; 0: none.",
        )
        self._rate = metrics.gauge("sglang:spec_accept_rate", "Accepted over verified drafted tokens; 0: none.")
        self._calls = metrics.counter("sglang:spec_verify_calls_total", "Verify passes, counted by request.")
        tokens = metrics.counters("echo_rl:spec_tokens_total", "Drafted tokens, by what became of them.", "stage")
        self._tokens = {stage: tokens(stage) for stage in STAGES}
        self._reached = metrics.counters("echo_rl:spec_reached_total", "Paths with a node to accept there.", "depth")
        self._accepted = metrics.counters("echo_rl:spec_accepted_total", "Accepted tokens at a depth.", "depth")
        self._plan = {name: metrics.gauge(f"echo_rl:spec_{name}", text) for name, text in PLAN.items()}
        self._knee = metrics.gauge(
            "echo_rl:spec_knee", "Most nodes worth verifying at this batch, by the cost profile; 0 is unknown."
        )
        self._seconds = metrics.histogram("echo_rl:step_seconds", "Wall time of a step.", STEP_BUCKETS)
        phases = metrics.counters("echo_rl:phase_seconds_total", "Time by phase of the steps.", "phase")
        self._phases = {phase: phases(phase) for phase in PHASES}
        self._swaps = metrics.counter("echo_rl:controller_swaps_total", "Times that another controller took over.")
        self._info = Gauge(
            "echo_rl:controller_info", "The controller in force.", [MODEL, "controller"], registry=metrics.registry
        )

    def step(self, stats: StepStats) -> None:
        """Counts one step."""
        step = stats.step
        self._recent.append(stats)
        self._drop_old(step.end)
        self._seconds.observe(step.seconds)
        self._knee.set(stats.knee)
        for name, gauge in self._plan.items():
            gauge.set(getattr(step, name))
        for phase, seconds in self._phases.items():
            seconds.inc(getattr(step.times, phase))
        for stage, tokens in self._tokens.items():
            tokens.inc(getattr(step, stage))
        for depth, value in enumerate(step.reached_by_depth):
            self._reached(depth).inc(value)
        for depth, value in enumerate(step.accepted_by_depth):
            self._accepted(depth).inc(value)
        if step.verified:
            self._calls.inc(step.batch_size)
        if self._last is None or self._last.controller != stats.controller:
            self._set_controller(stats.controller)
        self._last = stats

    def refresh(self, now: float, idle: bool) -> None:
        """Brings gauges up to date; `now` is in seconds since the epoch. An idle engine takes no steps that would."""
        self._drop_old(now)
        last = self._last
        self._running.set(0 if idle or last is None else last.running)
        self._queued.set(0 if idle or last is None else last.step.waiting)
        self._kv.set(0.0 if idle or last is None else last.kv_used)
        tokens = sum(stats.tokens for stats in self._recent)
        span = now - self._recent[0].step.end + self._recent[0].step.seconds if self._recent else 0.0
        self._throughput.set(tokens / span if span > 0 else 0.0)
        speculating = [stats for stats in self._recent if stats.step.verified]
        requests, verified = (sum(getattr(s.step, of) for s in speculating) for of in ("batch_size", "verified"))
        self._length.set(sum(s.step.committed for s in speculating) / requests if requests else 0.0)
        self._rate.set(sum(s.step.accepted for s in speculating) / verified if verified else 0.0)

    def _drop_old(self, now: float) -> None:
        while self._recent and self._recent[0].step.end < now - WINDOW_SECONDS:
            self._recent.popleft()

    def _set_controller(self, spec: str) -> None:
        """Exposes the controller's name alone, since its options may name files."""
        if self._last is not None:
            self._swaps.inc()
        self._info.clear()
        self._info.labels(self._model, spec.partition(":")[0]).set(1)
