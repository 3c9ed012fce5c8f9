"""Prometheus metrics that all carry the model's name, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

MODEL = "model_name"


class ModelMetrics:
    """Makes the metrics of one model and registers them."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, [MODEL], registry=self.registry).labels(self.model)

    def counters(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        """Returns a function from the values of further labels to their counter."""
        return cache(partial(Counter(name, text, [MODEL, *labels], registry=self.registry).labels, self.model))

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, [MODEL], registry=self.registry).labels(self.model)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        """`buckets` are their upper ends, ascending; one more takes what lies beyond."""
        return Histogram(name, text, [MODEL], registry=self.registry, buckets=buckets).labels(self.model)
