"""Prometheus counters of what was really speculated, beside SGLang's own series.

SGLang's own series stay as they are and keep their meaning under a changing shape, but for ``spec_accept_rate``: it
divides by ``verify calls * (num_draft_tokens - 1)`` with the draft tokens of the moment. True counts are exported
beside it: rate(echo_rl:spec_accepted_tokens_total) / rate(echo_rl:spec_verified_tokens_total).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from echo_rl.integrations.sglang.steering import Steering

COUNTERS: Mapping[str, tuple[str, str]] = {
    "steps": ("echo_rl:spec_steps", "Decode steps that were reported."),
    "plain_steps": ("echo_rl:spec_plain_steps", "Of them, steps that drafted nothing."),
    "drafted": ("echo_rl:spec_drafted_tokens", "Nodes that the drafter proposed."),
    "verified": ("echo_rl:spec_verified_tokens", "Drafted nodes that were verified, roots not counted."),
    "accepted": ("echo_rl:spec_accepted_tokens", "Drafted nodes that were accepted."),
    "committed": ("echo_rl:spec_committed_tokens", "Tokens committed, bonus tokens included."),
    "budget": ("echo_rl:spec_budget_tokens", "Nodes that the controller's plans allowed."),
    "decisions": ("echo_rl:spec_decisions", "Plans made; steps launched before a report repeat the plan in force."),
    "switches": ("echo_rl:spec_switches", "Steps of another shape than the step before."),
    "failures": ("echo_rl:spec_controller_failures", "Times that the controller raised."),
    "lost": ("echo_rl:spec_lost_reports", "Launched steps whose report never came."),
}
"""Field of `steering.Counts` -> (name, without Prometheus' ``_total``; what it counts)."""


class Exporter:
    """Adds a steering's counts to Prometheus counters; does nothing where the client isn't installed.

    The client is imported here and not before: SGLang must first have named the folder of its
    multi-process mode.
    """

    def __init__(self, steering: Steering, controller: str, registry: Any = None) -> None:
        self._steering = steering
        self._exported = dict.fromkeys(COUNTERS, 0)
        try:
            from prometheus_client import REGISTRY, Counter
        except ImportError:
            self._series: dict[str, Any] = {}
            return
        self._series = {
            field: Counter(name, text, ["controller"], registry=registry or REGISTRY).labels(controller)
            for field, (name, text) in COUNTERS.items()
        }

    def export(self) -> None:
        counts = asdict(self._steering.counts)
        for field, series in self._series.items():
            series.inc(counts[field] - self._exported[field])
        self._exported = counts
