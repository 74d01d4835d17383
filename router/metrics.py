"""What the router counts, for Prometheus. Names that vLLM's dashboards know begin with `vllm:`;
those that only a disaggregated cluster has begin with `pdserve:`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from pdserve.protocol.errors import ErrorCode
from pdserve.router.admission import Admission
from pdserve.router.cluster_metrics import Alias, ClusterCollector, Idle
from pdserve.router.dispatch import Dispatcher
from pdserve.router.families import (
    FIRST_TOKEN_BUCKETS,
    NEXT_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    Families,
    length_buckets,
)
from pdserve.router.http_metrics import HttpMetrics
from pdserve.router.leg_metrics import LegMetrics
from pdserve.router.workers import WorkerPool

CONTENT_TYPE = CONTENT_TYPE_LATEST


class RouterMetrics:
    """All of one router's metrics, in a registry of its own."""

    def __init__(self, model_name: str, max_len: int) -> None:
        self._families = families = Families(model_name)
        self.registry, self._labels = families.registry, families.labels
        lengths = length_buckets(max_len)
        self._first = families.histogram(
            "vllm:time_to_first_token_seconds", "Request to first token.", FIRST_TOKEN_BUCKETS
        )
        between = families.family(
            "vllm:inter_token_latency_seconds", "From one token to the next.", NEXT_TOKEN_BUCKETS
        )
        self._next = between.labels(**self._labels)
        self.registry.register(Alias(between, "vllm:time_per_output_token_seconds"))
        self._per_token = families.histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            NEXT_TOKEN_BUCKETS,
        )
        self._whole = families.histogram(
            "vllm:e2e_request_latency_seconds", "Request to end of answer.", REQUEST_BUCKETS
        )
        self._prompt_length = families.histogram(
            "vllm:request_prompt_tokens", "Length of prompts.", lengths
        )
        self._answer_length = families.histogram(
            "vllm:request_generation_tokens", "Length of answers.", lengths
        )
        self._longest_answer = families.histogram(
            "vllm:request_max_num_generation_tokens", "Longest answer of each request.", lengths
        )
        self._max_tokens = families.histogram(
            "vllm:request_params_max_tokens", "max_tokens of requests.", lengths
        )
        self._n = families.histogram("vllm:request_params_n", "n of requests.", (1, 2, 5, 10, 20))
        self._prompt_tokens = families.counter("vllm:prompt_tokens", "Prompt tokens.")
        self._tokens = families.counter("vllm:generation_tokens", "Generated tokens.")
        self._success = self._counter(
            "vllm:request_success", "Finished answers.", *self._labels, "finished_reason"
        )
        self._rejected = self._counter(
            "vllm:admission_rejections", "Requests refused for load.", "model_name", "reason"
        )
        self._moves = self._counter(
            "pdserve:leg_retries", "Legs that failed and went on elsewhere.", "kind", "reason"
        )
        self._dropped = self._counter(
            "pdserve:explain_dropped", "Records for `pdserve explain` that could not be written."
        )
        # Finding a metric's child by its labels is dearer than counting: each is looked up once.
        self._finish = functools.cache(
            lambda reason: self._success.labels(**self._labels, finished_reason=reason)
        )
        self.legs = LegMetrics(families, max_len)
        self.http = HttpMetrics(self.registry)
        self.registry.register(Idle(self._labels))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

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
            self.legs.prompt(prompt_tokens[place // n], cached)
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
