"""What the router counts, for Prometheus. Names that vLLM's dashboards know begin with `vllm:`;
those that only a disaggregated cluster has begin with `pdserve:`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from pdserve.protocol import events
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import LifeEvent
from pdserve.router.admission import Admission
from pdserve.router.cluster_metrics import Alias, ClusterCollector
from pdserve.router.dispatch import Dispatcher
from pdserve.router.workers import WorkerPool

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
PHASE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)

PHASES = (
    ("queue", events.QUEUED, events.SCHEDULED),
    ("prefill", events.SCHEDULED, events.FIRST_TOKEN),
    ("decode", events.FIRST_TOKEN, events.FINISHED),
)
"""Phase, the event that begins it, the event that ends it (both of one leg)."""

CONTENT_TYPE = CONTENT_TYPE_LATEST


def length_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … up to `longest` tokens."""
    found: list[float] = []
    scale = 1
    while scale <= longest:
        found += [scale * step for step in (1, 2, 5) if scale * step <= longest]
        scale *= 10
    return tuple(found)


class RouterMetrics:
    """All of one router's metrics, in a registry of its own."""

    def __init__(self, model_name: str, max_len: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        lengths = length_buckets(max_len)
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Request to first token.", FIRST_TOKEN_BUCKETS
        )
        between = self._family(
            "vllm:inter_token_latency_seconds", "From one token to the next.", NEXT_TOKEN_BUCKETS
        )
        self._next = between.labels(**self._labels)
        self.registry.register(Alias(between, "vllm:time_per_output_token_seconds"))
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            NEXT_TOKEN_BUCKETS,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Request to end of answer.", REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "In the queue of the first worker.", REQUEST_BUCKETS
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Scheduled to first token.", REQUEST_BUCKETS
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "First token to end of answer.", REQUEST_BUCKETS
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds",
            "Computed or fetched for by workers, all legs of an answer.",
            REQUEST_BUCKETS,
        )
        self._preemptions = self._histogram(
            "vllm:request_num_preemptions", "Times that an answer was preempted.", (0, 1, 2, 5, 10)
        )
        self._preempted = self._counter("vllm:num_preemptions", "Preemptions of answers.")
        self._prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Length of prompts.", lengths
        )
        self._answer_length = self._histogram(
            "vllm:request_generation_tokens", "Length of answers.", lengths
        )
        self._longest_answer = self._histogram(
            "vllm:request_max_num_generation_tokens", "Longest answer of each request.", lengths
        )
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens of answers that were not found in a prefix cache.",
            lengths,
        )
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "max_tokens of requests.", lengths
        )
        self._n = self._histogram("vllm:request_params_n", "n of requests.", (1, 2, 5, 10, 20))
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens.")
        self._cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens from caches.")
        self._asked = self._counter("vllm:prefix_cache_queries", "Prompt tokens of answers.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Those of them that were cached.")
        self._sources = {
            source: child.labels(**self._labels, source=source)
            for child in [
                Counter(
                    "vllm:prompt_tokens_by_source",
                    "Prompt tokens of answers, by how their first worker came to their KV.",
                    [*self._labels, "source"],
                    registry=self.registry,
                )
            ]
            for source in ("local_compute", "local_cache_hit")
        }
        self._tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._success = Counter(
            "vllm:request_success",
            "Finished answers.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Requests refused for load.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._moves = Counter(
            "pdserve:leg_retries",
            "Legs that failed and went on elsewhere.",
            ["kind", "reason"],
            registry=self.registry,
        )
        self._dropped = Counter(
            "pdserve:explain_dropped",
            "Records for `pdserve explain` that could not be written.",
            registry=self.registry,
        )
        self._phases = Histogram(
            "pdserve:phase_seconds",
            "Phases of legs, from the workers' life events.",
            ["kind", "phase"],
            buckets=PHASE_BUCKETS,
            registry=self.registry,
        )
        self._http = Counter(
            "http_requests",
            "HTTP requests.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self._http_time = Histogram(
            "http_request_duration_seconds",
            "Time to serve HTTP requests.",
            ["handler", "method"],
            registry=self.registry,
        )
        # Finding a metric's child by its labels is dearer than counting: each is looked up once.
        self._phase = functools.cache(self._phases.labels)
        self._finish = functools.cache(
            lambda reason: self._success.labels(**self._labels, finished_reason=reason)
        )
        self._http_child = functools.cache(self._http.labels)
        self._http_time_child = functools.cache(self._http_time.labels)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _family(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, list(self._labels), buckets=buckets, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._family(name, text, buckets).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        metric = Counter(name, text, list(self._labels), registry=self.registry)
        return metric.labels(**self._labels)

    def follow(self, pool: WorkerPool, dispatcher: Dispatcher, admission: Admission) -> None:
        """Also show the workers and the load, read at each scrape."""
        self.registry.register(ClusterCollector(pool, dispatcher, admission, self._labels))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    # what happened

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._labels["model_name"], reason).inc()

    def retried(self, kind: str, code: ErrorCode) -> None:
        self._moves.labels(kind, code.value).inc()

    def story_dropped(self, count: int) -> None:
        self._dropped.inc(count)

    def finished(self, reason: str) -> None:
        self._finish(reason).inc()

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._http_child(handler, method, f"{status // 100}xx").inc()
        self._http_time_child(handler, method).observe(seconds)

    def request(
        self,
        *,
        elapsed: float,
        to_first: float,
        prompt_tokens: Sequence[int],
        answers: Sequence[tuple[str, int]],
        max_tokens: Iterable[int],
        cached_tokens: Sequence[int],
    ) -> None:
        """A request was served. `answers`: (finish reason, tokens) of each; `cached_tokens`: of
        each, those of its prompt that its first worker had."""
        self._whole.observe(elapsed)
        self._n.observe(len(answers) / len(prompt_tokens))
        n = len(answers) // len(prompt_tokens)
        for place, cached in enumerate(cached_tokens):
            self._prompt_of_answer(prompt_tokens[place // n], cached)
        for length in prompt_tokens:
            self._prompt_tokens.inc(length)
            self._prompt_length.observe(length)
        for count in max_tokens:
            self._max_tokens.observe(count)
        self._longest_answer.observe(max(count for _, count in answers))
        for reason, count in answers:
            self._tokens.inc(count)
            self._answer_length.observe(count)
            if reason:
                self.finished(reason)
            if count > 1:
                self._per_token.observe((elapsed - to_first) / (count - 1))

    def _prompt_of_answer(self, length: int, cached: int) -> None:
        computed = max(0, length - cached)
        self._cached.inc(cached)
        self._asked.inc(length)
        self._hits.inc(cached)
        self._sources["local_compute"].inc(computed)
        self._sources["local_cache_hit"].inc(cached)
        self._computed.observe(computed)

    def answer(self, legs: Iterable[tuple[str, Sequence[LifeEvent]]]) -> None:
        """An answer has ended. `legs`: kind and events of each."""
        preemptions, seconds = 0, 0.0
        for kind, happened in legs:
            self.leg(kind, happened)
            preemptions += sum(event.name == events.PREEMPTED for event in happened)
            began = [event.at_s for event in happened if event.name == events.SCHEDULED]
            if began:
                seconds += happened[-1].at_s - began[0]
        self._preemptions.observe(preemptions)
        self._preempted.inc(preemptions)
        if seconds:
            self._inference.observe(seconds)

    def leg(self, kind: str, happened: Sequence[LifeEvent]) -> None:
        """A leg ended; its worker said what happened when."""
        at = {event.name: event.at_s for event in happened}
        for phase, begin, end in PHASES:
            if begin in at and end in at:
                self._phase(kind, phase).observe(at[end] - at[begin])
        waited = events.fetch_s(at)
        if waited is not None:
            self._phase(kind, "transfer").observe(waited)
        if kind in ("prefill", "full") and events.FIRST_TOKEN in at and events.SCHEDULED in at:
            self._queue.observe(at[events.SCHEDULED] - at.get(events.QUEUED, 0.0))
            self._prefill.observe(at[events.FIRST_TOKEN] - at[events.SCHEDULED])
        if kind != "prefill" and events.FINISHED in at:
            begin_s = at.get(events.FIRST_TOKEN, at.get(events.SCHEDULED, 0.0))
            self._decode.observe(at[events.FINISHED] - begin_s)
