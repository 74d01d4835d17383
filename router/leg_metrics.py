"""What becomes of legs: their phases, what they found in caches and fetched, and from whom."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.protocol import events
from pdserve.router.families import REQUEST_BUCKETS, Families, length_buckets
from pdserve.router.leg import AnswerLeg

PHASE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)

PHASES = (
    ("queue", events.QUEUED, events.SCHEDULED),
    ("prefill", events.SCHEDULED, events.FIRST_TOKEN),
    ("decode", events.FIRST_TOKEN, events.FINISHED),
)
"""Phase, the event that begins it, the event that ends it (both of one leg)."""

FETCHED = "external_kv_transfer"
"""vLLM's word for KV that came from another worker."""


class LegMetrics:
    """Told of every answer that has ended."""

    def __init__(self, families: Families, max_len: int) -> None:
        self._phases = Histogram(
            "pdserve:phase_seconds",
            "Phases of legs, from the workers' life events.",
            ["kind", "phase"],
            buckets=PHASE_BUCKETS,
            registry=families.registry,
        )
        self._phase = functools.cache(self._phases.labels)
        self._queue = families.histogram(
            "vllm:request_queue_time_seconds", "In the queue of the first worker.", REQUEST_BUCKETS
        )
        self._prefill = families.histogram(
            "vllm:request_prefill_time_seconds", "Scheduled to first token.", REQUEST_BUCKETS
        )
        self._decode = families.histogram(
            "vllm:request_decode_time_seconds", "First token to end of answer.", REQUEST_BUCKETS
        )
        self._inference = families.histogram(
            "vllm:request_inference_time_seconds",
            "Computed or fetched for by workers, all legs of an answer.",
            REQUEST_BUCKETS,
        )
        self._preemptions = families.histogram(
            "vllm:request_num_preemptions", "Times that an answer was preempted.", (0, 1, 2, 5, 10)
        )
        self._preempted = families.counter("vllm:num_preemptions", "Preemptions of answers.")
        self._computed = families.histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens of answers that were not found in a prefix cache.",
            length_buckets(max_len),
        )
        self._cached = families.counter("vllm:prompt_tokens_cached", "Prompt tokens from caches.")
        self._asked = families.counter("vllm:prefix_cache_queries", "Prompt tokens of answers.")
        self._hits = families.counter("vllm:prefix_cache_hits", "Those of them that were cached.")
        self._sources = families.by_source(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of answers by how workers came to their KV; those that a decode worker "
            "fetched count at the prefill worker, too.",
            ("local_compute", "local_cache_hit", FETCHED),
        )
        self._cached_sources = families.by_source(
            "vllm:prompt_tokens_cached_by_source",
            "Prompt tokens of answers that a worker did not have to compute.",
            ("local_cache_hit", FETCHED),
        )
        self._wanted = families.counter(
            "vllm:external_prefix_cache_queries", "Tokens whose KV was to be fetched."
        )
        self._fetched = families.counter(
            "vllm:external_prefix_cache_hits", "Those of them whose KV has come."
        )
        self._recomputed = families.counter(
            "vllm:prompt_tokens_recomputed",
            "Tokens computed again because their KV was lost with a worker or on its way.",
        )
        self._pairs = PairMetrics()
        families.registry.register(self._pairs)

    def prompt(self, length: int, cached: int) -> None:
        """An answer's prompt, and how much of it its first worker had."""
        computed = max(0, length - cached)
        self._cached.inc(cached)
        self._cached_sources["local_cache_hit"].inc(cached)
        self._asked.inc(length)
        self._hits.inc(cached)
        self._sources["local_compute"].inc(computed)
        self._sources["local_cache_hit"].inc(cached)
        self._computed.observe(computed)

    def answer(self, legs: Iterable[AnswerLeg]) -> None:
        """An answer has ended."""
        preemptions, seconds = 0, 0.0
        for leg in legs:
            self._leg(leg)
            preemptions += sum(event.name == events.PREEMPTED for event in leg.events)
            began = [event.at_s for event in leg.events if event.name == events.SCHEDULED]
            if began:
                seconds += leg.events[-1].at_s - began[0]
        self._preemptions.observe(preemptions)
        self._preempted.inc(preemptions)
        if seconds:
            self._inference.observe(seconds)

    def _leg(self, leg: AnswerLeg) -> None:
        """Its worker said what happened when."""
        kind, at = leg.kind, {event.name: event.at_s for event in leg.events}
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
        if kind == "moved" and leg.answered:
            self._recomputed.inc(max(0, leg.length - leg.cached))
        if leg.source:
            self._transfer(leg, at.keys(), waited or 0.0)

    def _transfer(self, leg: AnswerLeg, told: Iterable[str], waited_s: float) -> None:
        """A leg was to fetch what another one computed."""
        lost = events.RECOMPUTED in told
        if not lost and events.FETCHED not in told:
            return  # it has not told, or ended before
        tokens = leg.length - (not leg.early)  # nobody has computed the newest one's KV
        self._wanted.inc(tokens)
        if lost:
            self._recomputed.inc(tokens)
        else:
            self._fetched.inc(tokens)
            self._sources[FETCHED].inc(tokens)
            self._cached_sources[FETCHED].inc(tokens)
        self._pairs.count(leg.source, leg.link.worker_id, lost, tokens, waited_s)


class PairMetrics(Collector):
    """Transfers by who gave and who took; of pairs whose workers have long been replaced the
    oldest are forgotten."""

    MOST = 4096

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], list[float]] = {}
        """Arrived, lost, tokens that arrived, seconds waited for them."""

    def count(self, source: str, target: str, lost: bool, tokens: int, waited_s: float) -> None:
        if (source, target) not in self._pairs and len(self._pairs) >= self.MOST:
            del self._pairs[next(iter(self._pairs))]
        sums = self._pairs.setdefault((source, target), [0.0] * 4)
        if lost:
            sums[1] += 1
        else:
            for place, value in ((0, 1), (2, tokens), (3, waited_s)):
                sums[place] += value

    def collect(self) -> Iterable[Metric]:
        names = ["source", "target"]
        transfers = CounterMetricFamily(
            "pdserve:pair_transfers",
            "Hand-overs from one worker to another, by whether the KV arrived.",
            labels=[*names, "outcome"],
        )
        tokens = CounterMetricFamily(
            "pdserve:pair_tokens", "Tokens whose KV arrived.", labels=names
        )
        seconds = CounterMetricFamily(
            "pdserve:pair_wait_seconds",
            "Time that answers waited for KV that arrived, after their first token.",
            labels=names,
        )
        for pair, (arrived, lost, length, waited_s) in list(self._pairs.items()):
            transfers.add_metric([*pair, "arrived"], arrived)
            transfers.add_metric([*pair, "lost"], lost)
            tokens.add_metric(pair, length)
            seconds.add_metric(pair, waited_s)
        return (transfers, tokens, seconds)
