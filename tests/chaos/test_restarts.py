"""Workers killed again and again under load: no wrong answer, nothing kept, traffic resumes."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster
from load import Load

OPTIONS = (
    "--prefill", 1, "--decode", 1, "--served-model-name", "m", "--dtype", "float32",
    "--kv-cache-memory", "32MiB", "--max-num-batched-tokens", 32, "--max-num-seqs", 32,
    "--lease-s", 3,
)  # fmt: skip
RESUME_S = 2.0
"""From readiness to the next right answer."""
READY_S = 60.0


def pools_mapped(pid: int) -> int:
    """KV pools and their ledgers that a process has mapped, its own two included."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "memfd:pdserve" in line})


async def successor(cluster: Cluster, before: dict[str, Any]) -> dict[str, Any]:
    """The next incarnation, once it is ready."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        for record in await asyncio.to_thread(cluster.workers):
            same = record["worker_id"] == before["worker_id"]
            if same and record["epoch"] > before["epoch"] and record["state"] == "ready":
                return record
        await asyncio.sleep(0.05)
    raise AssertionError(f"{before['worker_id']} did not come back within {READY_S} s.")


async def resumed(load: Load) -> float:
    """Seconds until another answer is complete."""
    begun, count = time.monotonic(), len(load.finished)
    while len(load.finished) == count and time.monotonic() < begun + READY_S:
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def kill_again_and_again(cluster: Cluster, load: Load, victims: list[str]) -> None:
    await load.learn()
    traffic = asyncio.create_task(load.run(clients=4, seconds=3600.0))
    epochs: dict[str, int] = {}
    try:
        for role in victims:
            await resumed(load)
            before = await asyncio.to_thread(cluster.worker, role)
            assert before["epoch"] > epochs.get(role, 0)
            epochs[role] = before["epoch"]
            os.kill(before["pid"], signal.SIGKILL)
            await successor(cluster, before)
            took = await resumed(load)
            assert took < RESUME_S, f"no answer for {took:.1f} s after {role} was ready"
            assert not traffic.done(), traffic
    finally:
        traffic.cancel()
        results = await asyncio.gather(traffic, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError), results[0]


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(1, marks=pytest.mark.timeout(240)),
        pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_killed_workers_come_back(times: int, tmp_path: Path) -> None:
    """Each role `times` times, in turn."""
    folder = make_checkpoint(tmp_path / "nano", "llama", "nano")
    victims = list(itertools.islice(itertools.cycle(["prefill", "decode"]), 2 * times))
    with Cluster("--model", folder, *OPTIONS) as cluster:
        load = Load(cluster.url)
        asyncio.run(kill_again_and_again(cluster, load, [*victims, "prefill"]))
        cluster.wait_until_clean(5.0)  # a lease of a source that lost its reader may have to end
        assert len(load.finished) > 4 * times
        decode = cluster.worker("decode")
        assert pools_mapped(decode["pid"]) <= 4, "the pools of dead workers are still mapped"
