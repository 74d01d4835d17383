"""The load of the workers in the header of an answer, for proxies that balance by it (ORCA)."""

from __future__ import annotations

from pdserve.router.openai import encode_json
from pdserve.router.workers import WorkerPool

WANTED = "endpoint-load-metrics-format"
"""Request header: TEXT or JSON; any other value asks for nothing."""
REPORT = "endpoint-load-metrics"


def cluster_load(pool: WorkerPool) -> dict[str, float]:
    """Requests that wait for room or for their KV, and the share of KV blocks in use (0 to 1), over
    all workers."""
    statuses = [link.status for link in pool.links if link.status is not None]
    total = sum(status.blocks_total for status in statuses)
    free = sum(status.blocks_free + status.blocks_cached for status in statuses)
    return {
        "num_requests_waiting": float(sum(s.waiting + s.fetching for s in statuses)),
        "kv_cache_usage_perc": 1 - free / total if total else 0.0,
    }


def load_headers(wanted: str, pool: WorkerPool) -> dict[str, str]:
    """The header in the wanted format, or none."""
    if wanted.upper() == "TEXT":
        listed = [f"named_metrics.{name}={value}" for name, value in cluster_load(pool).items()]
        return {REPORT: f"TEXT {', '.join(listed)}"}
    if wanted.upper() == "JSON":
        return {REPORT: f"JSON {encode_json({'named_metrics': cluster_load(pool)}).decode()}"}
    return {}
