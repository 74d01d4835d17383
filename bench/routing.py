"""What choosing a worker costs, with simulated workers over a private Redis.

    python -P -m pdserve.bench.routing [--tokens 32768] [--rounds 300]

Prints, for growing numbers of workers and placed route hashes, in µs of this process' CPU time
(medians of nine runs):

- packing: the prompt as bytes, once per request, for its messages to workers
- hashing: the prompt's route hashes, once per request
- choosing: from the list of candidates to the verdict, asking Redis included
- in all: hashing + choosing, for which the aim is 150 µs
- and packing: the same with the packing, which each leg's message would need in any case
- batched: choosing, for 32 requests that wait at the same time and share a round trip
- list anew: the list of candidates, made when somebody joins, leaves or fails, and once a second

and the round trip, Redis' own time for it, and the bytes to Redis and back. It is one round trip
whatever the number of workers and routers: at most 64 workers are asked about. Besides, a worker
sends a report each 50 ms while something changes, to Redis alone. The placed hashes are random, but
for every worker's prefix of the prompt, whose length differs from worker to worker.

Last, what following the cluster costs: a router looks each 0.25 s at what has changed in Redis,
here for 1000 workers whose leases were all renewed, and of which none or ten have changed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import msgspec
import uvloop
from redis.asyncio import Redis

from pdserve.cluster.channel import Channel
from pdserve.cluster.membership import Membership
from pdserve.cluster.placement import LoadReport, Placement, ask
from pdserve.cluster.process import start, stop
from pdserve.cluster.records import ModelInfo, Role, WorkerRecord, WorkerState
from pdserve.cluster.redis_server import private_folder, private_redis, until_answering
from pdserve.protocol.blocks import ROUTE_BYTES, pack_tokens, route_hashes
from pdserve.router.candidates import Candidates, CandidateSet
from pdserve.router.chooser import Chooser, Need, Verdict
from pdserve.router.placement import Disaggregate, Policy
from pdserve.router.predict import Predictor
from pdserve.router.workers import WorkerPool

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
RUNS = 9
AIM_US = 150
COLUMNS = (
    "packing", "hashing", "choosing", "in all", "and packing", "batched", "list anew", "round trip",
    "in Redis", "bytes",
)  # fmt: skip
T = TypeVar("T")
MODEL = ModelInfo(
    architecture="Simulated", dtype="bfloat16", max_model_len=131072, vocab_size=150_000,
    block_size=16, fingerprint="simulated",
)  # fmt: skip


class _NoChannel:
    """To a worker that is simulated: nothing is ever sent."""

    closed = False


def record_of(name: str, role: Role) -> WorkerRecord:
    return WorkerRecord(
        worker_id=name, epoch=1, role=role, state=WorkerState.READY, host="", port=1, http_port=1,
        pid=1, model=MODEL,
    )  # fmt: skip


def join(pool: WorkerPool, name: str, role: Role) -> None:
    pool.adopt(record_of(name, role), cast(Channel, _NoChannel()))


async def place(placement: Placement, workers: int, placed: int, prompt: list[bytes]) -> None:
    """Report `placed` hashes from `workers` workers."""
    rng = random.Random(0)
    each = placed // workers
    for index in range(workers):
        held = prompt[: rng.randint(0, len(prompt))]
        noise = secrets.token_bytes(ROUTE_BYTES * (each - len(held)))
        parts = [noise[i : i + ROUTE_BYTES] for i in range(0, len(noise), ROUTE_BYTES)]
        load = LoadReport(rng.randint(0, 8000), rng.randint(0, 30), 10**6)
        await placement.report(f"w{index}", 1, 1, load, held + parts, whole=True)


def cpu_us(function: Callable[[], T], times: int = 50) -> tuple[float, T]:
    """CPU time of one call, the median of RUNS times so many, and its result."""
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(times):
            result = function()
        found.append((time.process_time() - began) / times * 1e6)
    return statistics.median(found), result


@dataclass(slots=True)
class Chosen:
    """What a number of choices took, in µs per choice."""

    cpu: float
    wall: float
    last: Verdict | None


async def choose(
    chooser: Chooser, find: Callable[[], CandidateSet], need: Need, rounds: int, at_once: int
) -> Chosen:
    """`at_once` at a time, as soon as those before them have been made."""
    loop = asyncio.get_running_loop()
    done, count = loop.create_future(), rounds * at_once
    verdicts: list[Verdict] = []

    def pick() -> None:
        for _ in range(at_once):
            chooser.pick(find(), need, take)

    def take(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if len(verdicts) == count:
            done.set_result(None)
        elif len(verdicts) % at_once == 0:
            loop.call_soon(pick)

    began, wall = time.process_time(), time.perf_counter()
    pick()
    await done
    cpu, took = time.process_time() - began, time.perf_counter() - wall
    return Chosen(cpu / count * 1e6, took / count * 1e6, verdicts[-1])


async def middle(run: Callable[[], Awaitable[Chosen]]) -> Chosen:
    """Of RUNS runs the one of median CPU time: less of what else the machine did."""
    return sorted([await run() for _ in range(RUNS)], key=lambda one: one.cpu)[RUNS // 2]


async def measure(
    url: str, workers: int, placed: int, tokens: list[int], rounds: int
) -> dict[str, float]:
    """One line of the table."""
    name = f"bench-{workers}-{placed}"
    placement, raw = Placement(url, name), Redis.from_url(url)
    pool = WorkerPool(Membership(url, name), secret="", name="bench")
    join(pool, "decode", Role.DECODE)
    for index in range(workers):
        join(pool, f"w{index}", Role.PREFILL)
    packing, text = cpu_us(lambda: pack_tokens(tokens))
    hashing, hashes = cpu_us(lambda: route_hashes(text))
    await place(placement, workers, placed, hashes)

    def listed() -> CandidateSet:
        found = Candidates(pool, Predictor(), Disaggregate.ALWAYS).for_prompt()
        found.asked(b"", random.Random(0))
        return found

    anew, _ = cpu_us(listed, 5)
    candidates = Candidates(pool, Predictor(), Disaggregate.ALWAYS)
    chooser = Chooser(placement, Policy.PREFIX, pool.load, random.Random(0))
    need = Need(len(tokens), lambda: hashes)
    await choose(chooser, candidates.for_prompt, need, 3, 1)
    await raw.config_resetstat()
    one = await middle(lambda: choose(chooser, candidates.for_prompt, need, rounds // RUNS, 1))
    called = (await raw.info("commandstats")).get("cmdstat_evalsha", {})
    some = max(1, rounds // BATCH // RUNS)
    many = await middle(lambda: choose(chooser, candidates.for_prompt, need, some, BATCH))
    _, options = candidates.for_prompt().asked(hashes[15], random.Random(0))
    question = ask(options, hashes, len(tokens), charge_tokens=True, random=0)
    size = len(question) + len(msgspec.msgpack.encode(one.last.choice if one.last else ()))
    await raw.flushall()
    await raw.aclose()
    await chooser.close()
    await pool.close()
    redis = float(called.get("usec_per_call", 0.0))
    in_all = hashing + one.cpu
    values = (
        packing, hashing, one.cpu, in_all, in_all + packing, many.cpu, anew, one.wall, redis, size,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


async def following(url: str, workers: int) -> str:
    """What a router's looks cost, as a sentence."""
    membership = Membership(url, "bench-following")
    records = [record_of(f"w{index}", Role.DECODE) for index in range(workers)]

    async def renew(some: Sequence[WorkerRecord]) -> None:
        for record in some:
            await membership.publish(record, lease_s=60.0)

    async def look() -> float:
        began = time.process_time()
        await membership.follow()
        return (time.process_time() - began) * 1e6

    await renew(records)
    first = await look()
    quiet, busy = [], []
    for turn in range(5):
        await renew([msgspec.structs.replace(one, routes={"p": str(turn)}) for one in records])
        quiet.append(await look())
        await renew([msgspec.structs.replace(one, detail=str(turn)) for one in records[:10]])
        busy.append(await look())
    await membership.close()
    return (
        f"A look at {workers} workers: {statistics.median(quiet):.0f} µs of router CPU, "
        f"{statistics.median(busy):.0f} when ten of them have changed; the first one {first:.0f}."
    )


def growth(found: dict[tuple[int, int], dict[str, float]]) -> str:
    """How the cost in all grows, as a sentence."""

    def times(less: tuple[int, int], more: tuple[int, int]) -> str:
        return f"{found[more]['in all'] / found[less]['in all']:.2f}"

    return (
        f"Router CPU of a choice: × {times((64, 100_000), (64, 1_000_000))} for 10 times the "
        f"blocks, × {times((8, 100_000), (64, 100_000))} from 8 to 64 workers, "
        f"× {times((64, 1_000_000), (1000, 1_000_000))} from 64 to 1000. With 64 workers and "
        f"1,000,000 blocks: {found[64, 1_000_000]['in all']:.0f} µs, with the packing "
        f"{found[64, 1_000_000]['and packing']:.0f} (aim: under {AIM_US})."
    )


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
    found = {}
    try:
        await until_answering(redis.url, child)
        print(f"prompt of {arguments.tokens} tokens; times in µs")
        print(f"{'workers':>7} {'placed':>9}" + "".join(f"{name:>12}" for name in COLUMNS))
        for size in SIZES:
            line = await measure(redis.url, *size, tokens, arguments.rounds)
            found[size] = line
            numbers = "".join(f"{line[name]:>12.0f}" for name in COLUMNS)
            print(f"{size[0]:>7} {size[1]:>9}{numbers}", flush=True)
        print(growth(found))
        print(await following(redis.url, 1000))
    finally:
        await stop([child], 2.0)
        shutil.rmtree(folder)


if __name__ == "__main__":
    uvloop.run(main())
