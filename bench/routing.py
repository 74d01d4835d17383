"""What choosing a worker costs, with simulated workers over a private Redis.

    python -P -m pdserve.bench.routing [--tokens 32768] [--rounds 300]

Prints, for growing numbers of workers and placed route hashes: the router's CPU time for packing
the prompt (once per request, for the messages to workers, too), for hashing it and for a choice,
the round trip, and Redis' own time for it. The placed hashes are random, but for every worker's
prefix of the prompt, whose length differs from worker to worker.
Choices that wait at the same time travel in one round trip; `batched CPU` is the time of each of
32 such choices. `bytes` go to Redis and back per choice, in one round trip whatever the number of
workers and routers: at most 64 workers are asked about. Besides, a worker sends a report each 50 ms
while something changes, to Redis alone.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
import uvloop
from redis.asyncio import Redis

from pdserve.cluster.placement import Ask, LoadReport, Option, Placement, ask, pack_options
from pdserve.cluster.process import start, stop
from pdserve.cluster.redis_server import private_folder, private_redis, until_answering
from pdserve.protocol.blocks import ROUTE_BYTES, pack_tokens, route_hashes
from pdserve.router.placement import MOST_ASKED

SIZES = (
    (1, 10_000),
    (8, 100_000),
    (64, 100_000),
    (64, 1_000_000),
    (256, 1_000_000),
    (1000, 1_000_000),
)
"""(workers, route hashes placed in all)."""
BATCH = 32
T = TypeVar("T")


async def place(
    placement: Placement, workers: int, placed: int, prompt: list[bytes]
) -> list[Option]:
    """Report `placed` hashes from `workers` workers; returns them as options."""
    rng = random.Random(0)
    each = placed // workers
    for index in range(workers):
        held = prompt[: rng.randint(0, len(prompt))]
        noise = secrets.token_bytes(ROUTE_BYTES * (each - len(held)))
        parts = [noise[i : i + ROUTE_BYTES] for i in range(0, len(noise), ROUTE_BYTES)]
        load = LoadReport(rng.randint(0, 8000), rng.randint(0, 30), 10**6)
        await placement.report(f"w{index}", 1, 1, load, held + parts, whole=True)
    return [Option(f"w{index}", 1) for index in range(workers)]


def cpu_s(function: Callable[[], T], times: int = 50) -> tuple[float, T]:
    """CPU seconds of one call, and its result."""
    began = time.process_time()
    for _ in range(times):
        result = function()
    return (time.process_time() - began) / times, result


async def measure(url: str, workers: int, placed: int, tokens: list[int], rounds: int) -> str:
    """One line of the table."""
    placement, raw = Placement(url, f"bench-{workers}-{placed}"), Redis.from_url(url)
    packing, text = cpu_s(lambda: pack_tokens(tokens))
    hashing, hashes = cpu_s(lambda: route_hashes(text))
    options = pack_options((await place(placement, workers, placed, hashes))[:MOST_ASKED])

    def question() -> Ask:
        return ask(
            options, hashes, len(tokens), charge_tokens=True, random=random.getrandbits(30)
        )  # fmt: skip

    await placement.choose([question()])
    await raw.config_resetstat()
    began, wall = time.process_time(), time.perf_counter()
    for _ in range(rounds):
        await placement.choose([question()])
    choosing = (time.process_time() - began) / rounds
    trip = (time.perf_counter() - wall) / rounds
    redis = float((await raw.info("commandstats"))["cmdstat_evalsha"]["usec_per_call"])
    began = time.process_time()
    for _ in range(max(1, rounds // BATCH)):
        await placement.choose([question() for _ in range(BATCH)])
    batched = (time.process_time() - began) / (max(1, rounds // BATCH) * BATCH)
    await raw.flushall()
    await raw.aclose()
    await placement.close()
    choice = (await placement.choose([question()]))[0]
    size = len(question()) + len(msgspec.msgpack.encode(choice))
    times = [packing * 1e6, hashing * 1e6, choosing * 1e6, trip * 1e6, redis, batched * 1e6]
    return f"{workers:>7} {placed:>9}" + "".join(f"{value:>12.0f}" for value in [*times, size])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=300, help="choices per line")
    arguments = parser.parse_args()
    rng = random.Random(0)
    tokens = [rng.randrange(150_000) for _ in range(arguments.tokens)]
    folder = private_folder()
    redis = private_redis(folder, folder / "redis.log")
    child = start(redis.command)
    try:
        await until_answering(redis.url, child)
        print(f"prompt of {arguments.tokens} tokens; times in µs")
        names = (
            "packing",
            "hashing",
            "choice CPU",
            "round trip",
            "in Redis",
            "batched CPU",
            "bytes",
        )
        print(f"{'workers':>7} {'placed':>9}" + "".join(f"{name:>12}" for name in names))
        for workers, placed in SIZES:
            print(await measure(redis.url, workers, placed, tokens, arguments.rounds), flush=True)
    finally:
        await stop([child], 2.0)
        shutil.rmtree(folder)


if __name__ == "__main__":
    uvloop.run(main())
