"""What each worker measures, in Prometheus' families; the label `engine` is the worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from pdserve.protocol.measures import Measures, Spread
from pdserve.protocol.messages import WorkerStatus
from pdserve.router.link import WorkerLink

SPREADS = {
    "vllm:iteration_tokens_total": ("Tokens of each engine step.", "step_tokens"),
    "vllm:nixl_xfer_time_seconds": ("Time of each transfer of KV.", "transfer_s"),
    "vllm:nixl_post_time_seconds": ("Time to ask for it.", "post_s"),
    "vllm:nixl_bytes_transferred": ("Bytes of each transfer of KV.", "transfer_bytes"),
    "vllm:nixl_num_descriptors": ("Blocks, or parts of them, of each.", "transfer_blocks"),
}
"""Histogram → its text, and the field of Measures. vLLM names them after the library it uses."""
RESIDENCE = {
    "vllm:kv_block_lifetime_seconds": ("From a block's allocation to its eviction.", "lifetime"),
    "vllm:kv_block_idle_before_evict_seconds": ("From its last use to its eviction.", "idle"),
    "vllm:kv_block_reuse_gap_seconds": ("Between its last uses.", "reuse_gap"),
}
"""The same of Residence: present where a worker has --kv-cache-metrics."""
COUNTS = {
    "vllm:nixl_num_failed_transfers": ("Transfers of KV that failed.", "failed_transfers"),
    "vllm:nixl_num_failed_notifications": (
        "Sources that could not be told that a transfer was over.",
        "failed_releases",
    ),
    "vllm:nixl_num_kv_expired_reqs": (
        "Prefills whose KV nobody fetched in time.",
        "expired_tickets",
    ),
}


def estimated(
    statuses: Iterable[tuple[WorkerLink, WorkerStatus]], labels: dict[str, str]
) -> Iterable[Metric]:
    """What the steps of each worker cost."""
    estimates = [
        CounterMetricFamily(f"vllm:estimated_{name}_per_gpu", text, labels=list(labels))
        for name, text in (
            ("flops", "Floating-point operations, attention left out."),
            ("read_bytes", "Bytes of weights that steps read, each step all of them."),
            ("write_bytes", "Bytes of KV that steps wrote."),
        )
    ]
    for link, status in statuses:
        key = [labels["model_name"], link.worker_id]
        if (model := link.record.model) is not None:
            tokens = status.step_tokens
            values = (
                model.token_flops * tokens,
                model.weight_nbytes * status.steps,
                model.token_nbytes * tokens,
            )
            for family, value in zip(estimates, values, strict=True):
                family.add_metric(key, value)
    return estimates


def measured(workers: Iterable[tuple[str, Measures]], labels: dict[str, str]) -> Iterable[Metric]:
    """Of each worker (by name) what it has measured."""
    told = [([labels["model_name"], name], measures) for name, measures in workers]
    names = list(labels)
    for name, (text, field) in SPREADS.items():
        spreads = [(key, getattr(measures, field)) for key, measures in told]
        yield _histogram(name, text, names, spreads)
    lives = [(key, one.residence) for key, one in told if one.residence is not None]
    for name, (text, field) in RESIDENCE.items() if lives else ():
        yield _histogram(name, text, names, [(key, getattr(one, field)) for key, one in lives])
    for name, (text, field) in COUNTS.items():
        yield _counter(name, text, names, [(key, getattr(one, field)) for key, one in told])
    corrupted = [(k, n) for k, one in told if (n := one.corrupted_requests) is not None]
    if corrupted:
        text = "Requests with logits that are not numbers."
        yield _counter("vllm:corrupted_requests", text, names, corrupted)


def _histogram(
    name: str, text: str, labels: Sequence[str], spreads: Iterable[tuple[list[str], Spread]]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, spread in spreads:
        bounds = [*map(str, spread.bounds), "+Inf"]
        counts = itertools.accumulate(spread.counts)
        family.add_metric(key, list(zip(bounds, counts, strict=True)), spread.total)
    return family


def _counter(
    name: str, text: str, labels: Sequence[str], counts: Iterable[tuple[list[str], int]]
) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, count in counts:
        family.add_metric(key, count)
    return family
