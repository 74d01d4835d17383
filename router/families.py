"""Metrics with the labels that all of a router's have."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
NEXT_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip


def length_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … up to `longest` tokens."""
    found: list[float] = []
    scale = 1
    while scale <= longest:
        found += [scale * step for step in (1, 2, 5) if scale * step <= longest]
        scale *= 10
    return tuple(found)


class Families:
    """Makes metrics in one registry."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "engine": "0"}

    def family(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, list(self.labels), buckets=buckets, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self.family(name, text, buckets).labels(**self.labels)

    def counter(self, name: str, text: str) -> Counter:
        metric = Counter(name, text, list(self.labels), registry=self.registry)
        return metric.labels(**self.labels)

    def by_source(self, name: str, text: str, sources: Sequence[str]) -> dict[str, Counter]:
        """One counter for each value of the label `source`."""
        metric = Counter(name, text, [*self.labels, "source"], registry=self.registry)
        return {source: metric.labels(**self.labels, source=source) for source in sources}
