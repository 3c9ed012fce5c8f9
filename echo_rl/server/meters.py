"""Prometheus meters that all carry the model's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)


class Meters:
    """Makes meters in one registry. A meter without further labels comes bound to the model."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._model = model

    def counter(self, name: str, text: str) -> Counter:
        return self._bound(Counter(name, text, ["model_name"], registry=self._registry))

    def gauge(self, name: str, text: str) -> Gauge:
        return self._bound(Gauge(name, text, ["model_name"], registry=self._registry))

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._bound(Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry))

    def counters(self, name: str, text: str, *labels: str) -> Labelled:
        """A counter for every value of further labels."""
        return Labelled(Counter(name, text, ["model_name", *labels], registry=self._registry), self._model)

    def _bound(self, meter: M) -> M:
        return meter.labels(self._model)


class Labelled:
    """A counter by labels; each combination is looked up once."""

    def __init__(self, counter: Counter, model: str) -> None:
        self._counter = counter
        self._model = model
        self._bound: dict[tuple[str, ...], Counter] = {}

    def add(self, amount: float, *values: object) -> None:
        key = tuple(map(str, values))
        if key not in self._bound:
            self._bound[key] = self._counter.labels(self._model, *key)
        self._bound[key].inc(amount)
