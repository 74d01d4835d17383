"""The routing policies on a sample of a production trace: hits, balance, first tokens."""

from __future__ import annotations

import asyncio

from redis_for_tests import redis_for_tests

from pdserve.bench.placement import BLOCK, Cache, Job, compare, read_jobs
from pdserve.bench.workloads import MOONCAKE


def test_prefix_routing_has_nine_tenths_of_the_hits_and_an_even_load() -> None:
    jobs = read_jobs(MOONCAKE, 400)

    async def main() -> None:
        async with redis_for_tests() as redis:
            best, results = await compare(redis.url, jobs, 4, 65_536 // BLOCK, busy=0.5)
        prefix, least, turns = results
        assert prefix.hit_rate >= 0.9 * best, results
        assert prefix.balance < 1.3
        assert prefix.ttft_p50_ms <= 0.5 * turns.ttft_p50_ms
        assert max(least.hit_rate, turns.hit_rate) < 0.7 * best

    asyncio.run(main())


def test_the_simulated_cache_forgets_the_ends_of_the_oldest_prefixes() -> None:
    def job(*blocks: bytes) -> Job:
        return Job(0.0, list(blocks), list(blocks), len(blocks) * BLOCK + 1, 1)

    cache = Cache(4)
    cache.store(job(b"a", b"b", b"c"))
    assert cache.hit(job(b"a", b"b", b"x")) == 2 * BLOCK
    cache.store(job(b"d", b"e"))
    assert cache.hit(job(b"a", b"b", b"c")) == 2 * BLOCK and cache.news[b"c"] is False
