"""Nine of ten clients leave in the middle: the others are served, and all is well soon after."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster
from load import Load

OPTIONS = (
    "--prefill", 1, "--decode", 1, "--served-model-name", "m", "--dtype", "float32",
    "--kv-cache-memory", "32MiB", "--max-num-batched-tokens", 32, "--max-num-seqs", 32,
)  # fmt: skip
CLIENTS = 8
RECOVERY_S = 5.0


def rates(load: Load, begin: float, seconds: int) -> list[int]:
    """Answers in each of the seconds from `begin` on."""
    return [
        sum(begin + second <= at < begin + second + 1 for at in load.finished)
        for second in range(seconds)
    ]


async def storm(load: Load, calm_s: int, storm_s: float) -> tuple[float, float]:
    """(answers per second before, the best second of the first RECOVERY_S after the storm)."""
    await load.learn()
    await load.run(CLIENTS, 1.0)
    begin = time.monotonic()
    await load.run(CLIENTS, calm_s)
    before = statistics.median(rates(load, begin, calm_s))
    await load.run(4 * CLIENTS, storm_s, leaving=0.9)
    assert load.left > 20 * storm_s, "that was no storm"
    end = time.monotonic()
    await load.run(CLIENTS, RECOVERY_S)
    return before, max(rates(load, end, int(RECOVERY_S)))


@pytest.mark.parametrize(
    ("calm_s", "storm_s", "share"),
    [
        pytest.param(3, 3.0, 0.5, marks=pytest.mark.timeout(240)),
        pytest.param(5, 30.0, 0.95, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
    ids=["short", "long"],
)
def test_an_abort_storm_passes(calm_s: int, storm_s: float, share: float, tmp_path: Path) -> None:
    """The short one allows for a busy machine: what it looks for is a cluster that stays down."""
    folder = make_checkpoint(tmp_path / "nano", "llama", "nano")
    with Cluster("--model", folder, *OPTIONS) as cluster:
        load = Load(cluster.url)
        before, after = asyncio.run(storm(load, calm_s, storm_s))
        cluster.wait_until_clean(1.0)
        assert load.failed == []
        assert after >= share * before, f"{before} answers a second before, {after} after"
