"""What the engine's steps say: load, throughput and speculation.

Names are SGLang's where the meaning is equal. Its count of proposed tokens assumes a fixed tree, so the true counts
stand under ``echo_rl:spec_*``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Gauge

from echo_rl.server.api.meters import Counter, Meters
from echo_rl.server.messages import StepStats
from echo_rl.workloads.metrics import PHASES

WINDOW_SECONDS = 5.0
PLAN = {
    "budget": "Nodes that the last plan allowed over the batch; 0 is plain decoding.",
    "depth": "Levels of the last plan.",
    "width": "Width of the last plan.",
}
STAGES = ("drafted", "verified", "accepted")
STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class StepMetrics:
    """Fed with every step's statistics; rates are over the last seconds."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        meters = Meters(registry, model)
        self._model = model
        self._recent: deque[StepStats] = deque()
        self._last: StepStats | None = None
        self._running = meters.gauge("sglang:num_running_reqs", "Running requests.")
        self._queued = meters.gauge("sglang:num_queue_reqs", "Requests in the waiting queue.")
        self._kv = meters.gauge("sglang:token_usage", "Share of the KV cache in use.")
        self._throughput = meters.gauge("sglang:gen_throughput", "Generated tokens a second, of the last seconds.")
        self._length = meters.gauge(
            "sglang:spec_accept_length",
            "Mean tokens a request gets from a pass that speculates; 0: none.",
        )
        self._rate = meters.gauge("sglang:spec_accept_rate", "Accepted over verified drafted tokens; 0: none.")
        self._calls = meters.counter("sglang:spec_verify_calls_total", "Verify passes, counted by request.")
        self._tokens = meters.counter("echo_rl:spec_tokens_total", "Drafted tokens, by what became of them.", "stage")
        self._reached = meters.counter("echo_rl:spec_reached_total", "Paths with a node to accept there.", "depth")
        self._accepted = meters.counter("echo_rl:spec_accepted_total", "Accepted tokens at a depth.", "depth")
        self._plan = {name: meters.gauge(f"echo_rl:spec_{name}", text) for name, text in PLAN.items()}
        self._knee = meters.gauge(
            "echo_rl:spec_knee", "Most nodes worth verifying at this batch, by the cost profile; 0 is unknown."
        )
        self._seconds = meters.histogram("echo_rl:step_seconds", "Wall time of a step.", STEP_BUCKETS)
        self._phases = meters.counter("echo_rl:phase_seconds_total", "Time by phase of the steps.", "phase")
        self._swaps = meters.counter("echo_rl:controller_swaps_total", "Times that another controller took over.")
        rollbacks = meters.counter(
            "echo_rl:controller_rollbacks_total",
            "Times that a new controller failed its trial and the one before it came back.",
        )
        self._rollbacks = _Increments(lambda amount, _: rollbacks.add(amount))
        self._fallbacks = _Increments(
            meters.counter("echo_rl:fallbacks_total", "Decisions that ECHO took over.", "cause").add
        )
        self._serving = _Increments(
            meters.counter(
                "echo_rl:served_total",
                "Steps served on the device, steps left to the host by cause (eager:...), graphs (graphs:...).",
                "way",
            ).add
        )
        self._info = Gauge(
            "echo_rl:controller_info", "The controller in force.", ["model_name", "controller"], registry=registry
        )

    def step(self, stats: StepStats) -> None:
        """Count one step."""
        step = stats.step
        self._keep(stats)
        self._seconds.observe(step.seconds)
        self._knee.value = stats.knee
        for name in PLAN:
            self._plan[name].value = getattr(step, name)
        for phase in PHASES:
            self._phases.add(getattr(step.times, phase), phase)
        for stage in STAGES:
            self._tokens.add(getattr(step, stage), stage)
        _by_depth(self._reached, step.reached_by_depth)
        _by_depth(self._accepted, step.accepted_by_depth)
        if step.verified:
            self._calls.add(step.batch_size)
        self._fallbacks.see(stats.fallbacks)
        self._rollbacks.see({"": stats.rollbacks})
        self._serving.see(stats.serving)
        if self._last is None or self._last.controller != stats.controller:
            self._controller(stats.controller)
        self._last = stats

    def refresh(self, now: float, idle: bool) -> None:
        """Bring gauges up to date; `now` is in seconds since the epoch. An idle engine takes no steps that would."""
        self._drop_old(now)
        last = self._last
        self._running.value = 0 if idle or last is None else last.running
        self._queued.value = 0 if idle or last is None else last.step.waiting
        self._kv.value = 0.0 if idle or last is None else last.kv_used
        tokens = sum(stats.tokens for stats in self._recent)
        span = now - self._recent[0].step.end + self._recent[0].step.seconds if self._recent else 0.0
        self._throughput.value = tokens / span if span > 0 else 0.0
        speculating = [stats for stats in self._recent if stats.step.verified]
        requests, verified = (sum(getattr(s.step, of) for s in speculating) for of in ("batch_size", "verified"))
        self._length.value = sum(s.step.committed for s in speculating) / requests if requests else 0.0
        self._rate.value = sum(s.step.accepted for s in speculating) / verified if verified else 0.0

    def _keep(self, stats: StepStats) -> None:
        self._recent.append(stats)
        self._drop_old(stats.step.end)

    def _drop_old(self, now: float) -> None:
        while self._recent and self._recent[0].step.end < now - WINDOW_SECONDS:
            self._recent.popleft()

    def _controller(self, spec: str) -> None:
        """The name alone: options may name files."""
        if self._last is not None:
            self._swaps.add(1)
        self._info.clear()
        self._info.labels(self._model, spec.partition(":")[0]).set(1)


class _Increments:
    """Turns a core's totals since its start into what a counter adds: less than before means another core."""

    def __init__(self, add: Callable[[int, str], None]) -> None:
        self._add = add
        self._seen: Mapping[str, int] = {}

    def see(self, totals: Mapping[str, int]) -> None:
        if totals == self._seen:
            return
        for name, total in totals.items():
            before = self._seen.get(name, 0)
            self._add(total - before if total >= before else total, name)
        self._seen = dict(totals)


def _by_depth(counter: Counter, values: tuple[int, ...]) -> None:
    for depth, value in enumerate(values):
        counter.add(value, depth)
