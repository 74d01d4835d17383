"""What is read off the cluster, or off other metrics, when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pdserve.router.admission import Admission
from pdserve.router.dispatch import Dispatcher
from pdserve.router.load_report import cluster_load
from pdserve.router.worker_metrics import estimated, measured
from pdserve.router.workers import WorkerPool


class ClusterCollector(Collector):
    """Gauges that are read off the pool when somebody scrapes."""

    def __init__(
        self,
        pool: WorkerPool,
        dispatcher: Dispatcher,
        admission: Admission,
        labels: dict[str, str],
    ) -> None:
        self._admission = admission
        self._pool = pool
        self._dispatcher = dispatcher
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        statuses = [(link, link.status) for link in self._pool.links if link.status is not None]
        load = cluster_load(self._pool)
        fetching = sum(status.fetching for _, status in statuses)
        yield self._gauge(
            "vllm:num_requests_running",
            "Requests in prefill or decode on all workers.",
            sum(status.running for _, status in statuses),
        )
        yield self._gauge(
            "vllm:num_requests_waiting",
            "Requests waiting on all workers.",
            load["num_requests_waiting"],
        )
        waiting = load["num_requests_waiting"]
        reasons = {"capacity": waiting - fetching, "deferred": fetching}
        yield self._gauges(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting on all workers: for room, or for their KV.",
            "reason",
            reasons,
        )
        yield self._gauge(
            "vllm:cache_config_info",
            "Size of a KV block in tokens, and how many blocks all workers have.",
            1.0,
            block_size=_each(
                link.record.model.block_size for link, _ in statuses if link.record.model
            ),
            num_gpu_blocks=str(sum(status.blocks_total for _, status in statuses)),
        )
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of all KV blocks in use, 0 to 1.",
            load["kv_cache_usage_perc"],
        )
        yield self._gauge(
            "pdserve:answers_in_flight",
            "Answers that this router is generating.",
            self._dispatcher.in_flight,
        )
        yield self._gauge(
            "pdserve:answers_in_line",
            "Answers that wait at this router for room at the workers.",
            self._admission.in_line,
        )
        yield self._gauge(
            "pdserve:redis_up",
            "Whether Redis answered the last time.",
            float(self._pool.redis_error is None),
        )
        names = ["worker", "role"]
        up = GaugeMetricFamily("pdserve:worker_up", "Connected workers.", labels=names)
        usage = GaugeMetricFamily(
            "pdserve:worker_kv_usage", "Share of the worker's KV blocks in use.", labels=names
        )
        queued = GaugeMetricFamily(
            "pdserve:worker_queued_tokens", "Prompt tokens not yet computed.", labels=names
        )
        for link in self._pool.links:
            up.add_metric([link.worker_id, link.role.value], float(link.placeable))
        for link, status in statuses:
            key = [link.worker_id, link.role.value]
            used = status.blocks_total - status.blocks_free - status.blocks_cached
            usage.add_metric(key, used / status.blocks_total if status.blocks_total else 0.0)
            queued.add_metric(key, status.queued_tokens)
        yield from (up, usage, queued)
        yield from estimated(statuses, self._labels)
        measures = [(link.worker_id, link.measures) for link in self._pool.links if link.measures]
        yield from measured(measures, self._labels)

    def _gauges(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        """One for each value of a further label."""
        family = GaugeMetricFamily(name, text, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family

    def _gauge(self, name: str, text: str, value: float, **more: str) -> Metric:
        labels = {**self._labels, **more}
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


def _each(values: Iterable[int]) -> str:
    return ",".join(str(value) for value in sorted(set(values)))


class Alias(Collector):
    """A histogram under a second name, which older dashboards know."""

    def __init__(self, histogram: Histogram, name: str) -> None:
        self._histogram = histogram
        self._name = name

    def collect(self) -> Iterable[Metric]:
        for metric in self._histogram.collect():
            renamed = Metric(self._name, metric.documentation, metric.type)
            renamed.samples = [
                sample._replace(name=sample.name.replace(metric.name, self._name))
                for sample in metric.samples
            ]
            yield renamed


class Idle(Collector):
    """Features that are not there, under the names by which dashboards ask for them: no model
    sleeps, no adapter is loaded, nothing is drafted, no images are cached."""

    COUNTERS = (
        "mm_cache_queries",
        "mm_cache_hits",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
    )

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for name in self.COUNTERS:
            counter = CounterMetricFamily(f"vllm:{name}", "There is no such feature.", labels=names)
            counter.add_metric(values, 0)
            yield counter
        yield CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "There is no such feature.",
            labels=[*names, "position"],
        )
        sleep = GaugeMetricFamily(
            "vllm:engine_sleep_state", "Always awake.", labels=[*names, "sleep_state"]
        )
        for state in ("awake", "weights_offloaded", "discard_all"):
            sleep.add_metric([*values, state], float(state == "awake"))
        yield sleep
        adapters = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        lora = GaugeMetricFamily("vllm:lora_requests_info", "No adapters.", labels=adapters)
        lora.add_metric(["0", "", ""], 0)
        yield lora
