"""What is read off the cluster, or off other metrics, when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.router.admission import Admission
from pdserve.router.dispatch import Dispatcher
from pdserve.router.load_report import cluster_load
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
        yield self._gauge(
            "vllm:num_requests_running",
            "Requests in prefill or decode on all workers.",
            sum(status.running + status.fetching for _, status in statuses),
        )
        yield self._gauge(
            "vllm:num_requests_waiting",
            "Requests waiting on all workers.",
            load["num_requests_waiting"],
        )
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting on all workers, by what for.",
            load["num_requests_waiting"],
            reason="capacity",
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
