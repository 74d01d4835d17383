"""Four times more requests than can be served: some are served well, the rest refused at once."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

import psutil
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster
from overload import Crowd, Outcome

SHAPE = ("--prefill", 1, "--decode", 1, "--served-model-name", "m", "--kv-cache-memory", "32MiB")
OVERLOAD_S = float(os.environ.get("OVERLOAD_S", "60"))


def router_of(cluster: Cluster) -> psutil.Process:
    for child in psutil.Process(cluster.process.pid).children():
        if "pdserve.router" in child.cmdline():
            return child
    raise AssertionError("The launcher has no router.")


def checked(outcome: Outcome) -> Outcome:
    assert not outcome.wrong, outcome.wrong[:3]
    assert all(1 <= seconds <= 60 for seconds in outcome.retry_after)
    return outcome


@pytest.mark.timeout(240)
def test_what_is_too_much_is_refused_and_the_rest_is_served(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    limits = ("--max-waiting", 2, "--max-queue", 4)
    with Cluster("--model", model, *SHAPE, "--dtype", "float32", *limits) as cluster:
        crowd = Crowd(cluster.url)
        checked(asyncio.run(crowd.in_turn(2)))
        outcome = checked(asyncio.run(crowd.together(24, 3.0)))
        assert len(outcome.gaps) >= 4 and len(outcome.refused) >= 24
        assert not asyncio.run(crowd.in_turn(1)).refused
        cluster.wait_until_clean(5.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overload_for_a_minute(tmp_path: Path) -> None:
    """Prints the ratios; asserts what does not depend on who else uses the machine. The model takes
    some milliseconds per token: with a smaller one the clients and the router are most of the work
    of a machine of two cores, and who gets a core is all that is measured."""
    model = make_checkpoint(tmp_path, "llama", "mid", dtype="bfloat16")
    options = (*SHAPE, "--model", model, "--dtype", "bfloat16", "--max-model-len", 1024)
    with Cluster(*options) as cluster:
        alone = asyncio.run(Crowd(cluster.url).in_turn(20)).gap
    limits = ("--max-waiting", 4, "--max-itl-ms", 1200 * alone, "--max-queue", 32)
    with Cluster(*options, *limits) as cluster:
        crowd, router = Crowd(cluster.url), router_of(cluster)
        alone = asyncio.run(crowd.in_turn(20)).gap
        rate = len(asyncio.run(crowd.together(16, 8.0)).gaps) / 8
        for _ in range(2):  # what is served of more than can be, once that is known
            rate = len(asyncio.run(crowd.arriving(3 * rate, 8.0)).gaps) / 8
        memory = router.memory_info().rss
        outcome = checked(asyncio.run(crowd.arriving(4 * rate, OVERLOAD_S)))
        grown = (router.memory_info().rss - memory) / 2**20
        ended, back = time.monotonic(), Outcome()
        while time.monotonic() < ended + 5 and not (back.gaps and back.gap < 1.3 * alone):
            back = checked(asyncio.run(crowd.in_turn(3)))
        took = time.monotonic() - ended
        refused = sorted(outcome.refused)
        print(
            f"\n{len(outcome.gaps)} served, {len(refused)} refused of {4 * rate:.0f}/s; time "
            f"between tokens {outcome.gap / alone:.2f} × that of one alone ({alone * 1000:.1f} ms)"
            f"; 429 after {statistics.median(refused) * 1000:.1f} ms (median), "
            f"{refused[int(len(refused) * 0.99)] * 1000:.1f} ms (p99); router grew by {grown:.1f} "
            f"MiB; normal {took:.1f} s after the end"
        )
        assert outcome.gaps and len(refused) > len(outcome.gaps)
        assert grown < 64 and back.gaps and not back.refused
        cluster.wait_until_clean(5.0)
