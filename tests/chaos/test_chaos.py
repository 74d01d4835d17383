"""Streams through a storm: every one complete and the same as in calm, and nothing left over."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster
from redis import Redis
from storm import Storm, Streams, connections, group_of, half_closed, report

from pdserve.cluster.placement import BLOCKS_TTL_S
from pdserve.cluster.runfile import RunNote, running

ROUTERS, WORKERS = 2, 5
OPTIONS = (
    "--routers", ROUTERS, "--prefill", 2, "--decode", 3, "--served-model-name", "m",
    "--dtype", "float32", "--kv-cache-memory", "16MiB", "--max-num-batched-tokens", 256,
    "--lease-s", 3,
)  # fmt: skip
READY_S = 90.0
SHORT = {"seed": 65, "pause_s": (1.0, 2.0), "redis_at": (2, 6), "router_at": (4,), "most": 8}
"""One of each kind: both roles killed, a decode worker frozen for longer than its lease."""


def note_of(cluster: Cluster) -> RunNote:
    return next(note for note in running() if note.pid == cluster.process.pid)


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def all_ready(cluster: Cluster) -> list[dict[str, Any]]:
    end = time.monotonic() + READY_S
    while True:
        records = await asyncio.to_thread(cluster.workers)
        # The record of one that has just been killed stands until its lease ends.
        ready = [r for r in records if r["state"] == "ready" and runs(r["pid"])]
        if len(ready) == WORKERS:
            return records
        assert time.monotonic() < end, records
        await asyncio.sleep(0.2)


async def through(cluster: Cluster, streams: Streams, storm: Storm, count: int) -> float:
    """Seconds that the streams took."""
    await streams.learn()
    began = time.monotonic()
    storming = asyncio.create_task(storm.run())
    try:
        await streams.run(count, min(count, 20), storm.seed, storm.passed)
    finally:
        storming.cancel()
        results = await asyncio.gather(storming, return_exceptions=True)
    took = time.monotonic() - began
    assert isinstance(results[0], (asyncio.CancelledError, type(None))), results[0]
    await all_ready(cluster)
    await asyncio.to_thread(cluster.until_serving)
    return took


def check_redis(note: RunNote, records: list[dict[str, Any]], within_s: float) -> None:
    """Redis knows the living incarnations, the living routers, and no request."""
    client = Redis.from_url(note.redis, decode_responses=True)
    epochs = {record["worker_id"]: record["epoch"] for record in records}
    blocks = {f"{{{note.cluster}}}:blocks:{name}#{epoch}" for name, epoch in epochs.items()}
    end = time.monotonic() + within_s
    try:
        while True:
            found = {
                "workers": set(client.hkeys(f"{{{note.cluster}}}:workers")),
                "leases": set(client.zrange(f"{{{note.cluster}}}:leases", 0, -1)),
                "loads": set(client.hkeys(f"{{{note.cluster}}}:loads")),
            }
            routers = client.zcard(f"{{{note.cluster}}}:routers")
            stray = set(client.scan_iter(f"{{{note.cluster}}}:blocks:*")) - blocks
            for kind in ("requests", "aborts"):
                stray |= set(client.scan_iter(f"{{{note.cluster}}}:{kind}:*"))
            same = all(names == set(epochs) for names in found.values())
            if not stray and same and routers == ROUTERS:
                return
            assert time.monotonic() < end, (found, stray, epochs, routers)
            time.sleep(0.1)
    finally:
        client.close()


def check_sockets(records: list[dict[str, Any]], group: list[psutil.Process]) -> None:
    """One channel per router and worker, and none half closed."""
    end = time.monotonic() + 10
    while True:
        channels = [connections(record["pid"], record["port"]) for record in records]
        half = half_closed([process.pid for process in group if process.is_running()])
        if channels == [ROUTERS] * WORKERS and not half:
            return
        assert time.monotonic() < end, (channels, half)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("count", "load", "storm"),
    [
        pytest.param(50, (8, 400), SHORT, marks=pytest.mark.timeout(300)),
        pytest.param(500, (24, 900), {"seed": 500},
                     marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
    ids=["50", "500"],
)  # fmt: skip
def test_every_stream_survives(
    count: int, load: tuple[int, int], storm: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "nano", "llama", "nano")
    way = "always" if count == 50 else "auto"  # of the many, some are handed over and some are not
    with Cluster("--model", folder, *OPTIONS, "--disaggregate", way) as cluster:
        streams, weather = Streams(cluster.url, *load), Storm(cluster, **storm)
        streams.excused = weather.router_just_killed
        took = asyncio.run(through(cluster, streams, weather, count))
        print(report(streams, weather, took))
        assert not streams.wrong, "\n".join(streams.wrong[:5])
        assert streams.done >= count
        assert weather.happened["redis"] and weather.happened["router"], "that was no storm"
        cluster.wait_until_clean(5.0)  # a lease whose reader was killed may have to end
        records, group = cluster.workers(), group_of(cluster)
        check_redis(note_of(cluster), records, BLOCKS_TTL_S + 3)
        check_sockets(records, group)
        private = Path(note_of(cluster).folder)
    assert not psutil.wait_procs(group, timeout=5)[1], "processes are left over"
    assert not private.exists()
