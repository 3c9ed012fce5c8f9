"""Prometheus meters that all carry the model's name, for one event loop.

They are plain numbers until Prometheus asks: a step adds to dozens of them, and must not take a lock for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Meters:
    """Makes meters in one registry."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._model = model

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A counter, for every value of further labels."""
        meter = Counter(name, text, self._model, labels)
        self._registry.register(meter)
        return meter

    def gauge(self, name: str, text: str) -> Gauge:
        meter = Gauge(name, text, self._model)
        self._registry.register(meter)
        return meter

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        meter = Histogram(name, text, self._model, buckets)
        self._registry.register(meter)
        return meter


class Counter(Collector):
    def __init__(self, name: str, text: str, model: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._model, self._labels = name, text, model, labels
        self._sums: defaultdict[tuple[object, ...], float] = defaultdict(float)
        if not labels:
            self._sums[()] = 0.0

    def add(self, amount: float, *values: object) -> None:
        """`values` of the labels, in their order."""
        self._sums[values] += amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=["model_name", *self._labels])
        for values, amount in self._sums.items():
            family.add_metric([self._model, *map(str, values)], amount)
        yield family


class Gauge(Collector):
    def __init__(self, name: str, text: str, model: str) -> None:
        self._name, self._text, self._model = name, text, model
        self.value = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=["model_name"])
        family.add_metric([self._model], self.value)
        yield family


class Histogram(Collector):
    def __init__(self, name: str, text: str, model: str, buckets: Sequence[float]) -> None:
        """`buckets` are their upper ends, ascending; one more takes what lies beyond."""
        self._name, self._text, self._model = name, text, model
        self._ends = (*map(float, buckets), INF)
        self._counts = [0] * len(self._ends)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self._counts[bisect_left(self._ends, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        upto = zip(map(floatToGoString, self._ends), accumulate(self._counts), strict=True)
        family.add_metric([self._model], list(upto), self._sum)
        yield family
