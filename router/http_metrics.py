"""HTTP requests in the words of prometheus-fastapi-instrumentator, which vLLM's dashboards know."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary

FINE_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30,
    60,
)  # fmt: skip
COARSE_BUCKETS = (0.1, 0.5, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One that was served."""

    handler: str
    """The route's path; "none": there is no such route."""
    method: str
    status: int
    seconds: float
    received: int
    """Bytes of the body, as announced."""
    sent: int
    """Bytes of the answer's body."""


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            "http_requests", "HTTP requests.", ["handler", "method", "status"], registry=registry
        )
        times = Histogram(
            "http_request_duration_seconds",
            "Time to serve HTTP requests.",
            ["handler", "method"],
            buckets=COARSE_BUCKETS,
            registry=registry,
        )
        self._fine = Histogram(
            "http_request_duration_highr_seconds",
            "Time to serve HTTP requests of any kind.",
            buckets=FINE_BUCKETS,
            registry=registry,
        )
        received = Summary(
            "http_request_size_bytes", "Bodies of requests.", ["handler"], registry=registry
        )
        sent = Summary(
            "http_response_size_bytes", "Bodies of answers.", ["handler"], registry=registry
        )
        # Finding a metric's child by its labels is dearer than counting: each is looked up once.
        self._requests = functools.cache(requests.labels)
        self._times = functools.cache(times.labels)
        self._received = functools.cache(received.labels)
        self._sent = functools.cache(sent.labels)

    def count(self, request: HttpRequest) -> None:
        handler, method = request.handler, request.method
        self._requests(handler, method, f"{request.status // 100}xx").inc()
        self._times(handler, method).observe(request.seconds)
        self._fine.observe(request.seconds)
        self._received(handler).observe(request.received)
        self._sent(handler).observe(request.sent)
