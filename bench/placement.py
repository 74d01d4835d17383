"""Hits, balance and first tokens of the routing policies, over simulated workers and a real Redis.

    python -P -m pdserve.bench.placement [--workers 8] [--trace FILE] [--requests N]

Requests are those of the Mooncake conversation trace, lengths divided by 64; equal `hash_ids` are
equal tokens. Each conversation (by its first blocks) begins with one of 50 shared system prompts.
Workers compute prompts one after the other at a fixed speed, keep an LRU prefix cache of 16-token
blocks, and report to Redis as real ones do; choices are made by the routers' script. The clock is
simulated: arrivals are spaced so that the workers would be busy for the share `--busy` of the time
if they had the hits of one worker with all the cache ("ideal"). With more than 64 workers a choice
is about 64 of them, and the one that was chosen for the conversation last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.bench.arrivals import BenchError
from pdserve.bench.workloads import MOONCAKE, MOONCAKE_BLOCK, mooncake_rows
from pdserve.cluster.placement import LoadReport, Placement
from pdserve.cluster.process import start, stop
from pdserve.cluster.records import Role
from pdserve.cluster.redis_server import private_folder, private_redis, until_answering
from pdserve.protocol.blocks import (
    block_hashes,
    is_route_position,
    root_hash,
    route_hashes,
    route_index,
)
from pdserve.router.candidates import CandidateSet
from pdserve.router.chooser import OWN_VIEW, Chooser, Need, Verdict
from pdserve.router.placement import Candidate, Policy, WorkerLoad

SCALE = 64
"""Lengths of the trace are divided by this."""
SYSTEM_PROMPTS, SYSTEM_TOKENS = 50, 512
BLOCK = 16
TOKENS_PER_S = 20_000
STEP_S = 0.02
"""Between two tokens of an answer."""
REPORT_S = 0.05
POLICIES = ("prefix", "least-load", "round-robin")
ROOT = root_hash("bench")


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    at: float
    """Seconds since the start, before spacing."""
    blocks: list[bytes]
    """Hashes of its full blocks."""
    routes: list[bytes]
    length: int
    output: int


@dataclass(slots=True)
class Cache:
    """An LRU prefix cache of so many blocks; tells which route hashes come and go."""

    capacity: int
    held: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    """Block hash → route hash, or nothing; the oldest first."""
    news: dict[bytes, bool] = field(default_factory=dict)

    def hit(self, job: Job) -> int:
        """Tokens of its prompt that need not be computed; the last one always is."""
        usable = job.blocks[: (job.length - 1) // BLOCK]
        count = 0
        while count < len(usable) and usable[count] in self.held:
            count += 1
        return count * BLOCK

    def store(self, job: Job) -> None:
        # From the end, so that of a prefix the end goes first.
        for place in range(len(job.blocks) - 1, -1, -1):
            block, end = job.blocks[place], (place + 1) * BLOCK
            if block in self.held:
                self.held.move_to_end(block)
                continue
            route = job.routes[route_index(end)] if is_route_position(end) else b""
            self.held[block] = route
            if route:
                self.news[route] = True
        while len(self.held) > self.capacity:
            _, route = self.held.popitem(last=False)
            if route:
                self.news[route] = False


@dataclass(slots=True)
class Worker:
    """Computes one prompt after the other; answers of any number go on beside it."""

    name: str
    cache: Cache
    queue: deque[tuple[Job, float]] = field(default_factory=deque)
    """Jobs with their arrivals."""
    free_at: float = 0.0
    current: tuple[Job, float] | None = None
    decoding: list[float] = field(default_factory=list)
    """When its answers end."""
    reports: int = 0
    changed: bool = True
    computed: int = 0
    hits: int = 0
    served: int = 0
    first_tokens: list[float] = field(default_factory=list)

    @property
    def load(self) -> LoadReport:
        waiting = [*self.queue, *([self.current] if self.current else [])]
        queued = sum(job.length - self.cache.hit(job) for job, _ in waiting)
        return LoadReport(queued, len(waiting) + len(self.decoding), 10**7)

    @property
    def work(self) -> int:
        """What it had to do, as routers count: tokens computed, and 64 for each request."""
        return self.computed + 64 * self.served

    def advance(self, now: float) -> None:
        """Everything that happens until `now`."""
        while True:
            if self.current is not None:
                if self.free_at > now:
                    break
                self._finish()
            if not self.queue or self.free_at > now:
                break
            job, arrived = self.queue.popleft()
            hit = self.cache.hit(job)
            self.hits += hit
            self.computed += job.length - hit
            self.free_at = max(self.free_at, arrived) + (job.length - hit) / TOKENS_PER_S
            self.current = job, arrived
            self.changed = True
        ended = [end for end in self.decoding if end > now]
        self.changed |= len(ended) != len(self.decoding)
        self.decoding = ended

    def _finish(self) -> None:
        assert self.current is not None
        job, arrived = self.current
        self.current = None
        self.cache.store(job)
        self.served += 1
        self.first_tokens.append(self.free_at - arrived)
        self.decoding.append(self.free_at + job.output * STEP_S)
        self.changed = True


@dataclass(frozen=True, slots=True)
class Result:
    """One policy's run."""

    policy: str
    hit_rate: float
    """Share of prompt tokens that were not computed."""
    balance: float
    """Most work of a worker over least."""
    ttft_p50_ms: float
    ttft_p99_ms: float


def read_jobs(
    trace: Path, limit: int, scale: int = SCALE, systems: int = SYSTEM_PROMPTS
) -> list[Job]:
    """The trace's requests, at most `limit` (0: all), lengths divided by `scale`, with one of
    `systems` system prompts in front."""
    jobs = []
    for row in itertools.islice(mooncake_rows(trace), limit or None):
        tokens = _tokens(row.hashes, max(1, row.input_len // scale), scale, systems)
        jobs.append(
            Job(
                row.second,
                block_hashes(tokens, BLOCK, ROOT),
                route_hashes(tokens),
                len(tokens),
                max(1, row.output_len // scale),
            )
        )
    return jobs


def _tokens(hash_ids: Sequence[int], length: int, scale: int, systems: int) -> list[int]:
    """A system prompt, then for each hash id the tokens that are always the same for it. The second
    id is that of the conversation: the first is 0 throughout the trace."""
    system = hash_ids[min(1, len(hash_ids) - 1)] % systems
    tokens = [100_000 + system * SYSTEM_TOKENS + i for i in range(SYSTEM_TOKENS)]
    each = MOONCAKE_BLOCK // scale
    body = [1_000_000 + hash_id * each + i for hash_id in hash_ids for i in range(each)]
    return tokens + body[:length]


def ideal(jobs: Sequence[Job], capacity: int) -> tuple[int, int]:
    """(hit, computed) tokens of one worker with all the cache."""
    cache, hits = Cache(capacity), 0
    for job in jobs:
        hits += cache.hit(job)
        cache.store(job)
    return hits, sum(job.length for job in jobs) - hits


def arrivals(jobs: Sequence[Job], duration_s: float) -> Iterator[tuple[float, Job]]:
    """The trace's arrivals, stretched to take so long; those of the same moment are spread."""
    last = max(jobs[-1].at, 1e-9)
    rng = random.Random(0)
    spread = duration_s / len(jobs)
    yield from sorted(
        ((job.at / last * duration_s + rng.random() * spread, job) for job in jobs),
        key=lambda pair: pair[0],
    )


async def simulate(
    url: str, policy: str, jobs: Sequence[Job], count: int, capacity: int, duration_s: float
) -> Result:
    """Serve the jobs under one policy."""
    workers = [Worker(f"w{i}", Cache(capacity)) for i in range(count)]
    placement = Placement(url, f"sim-{policy}-{count}-{random.getrandbits(40)}")
    known = [WorkerLoad(worker_id=one.name, role=Role.PREFILL, epoch=1) for one in workers]
    chooser = Chooser(placement, Policy(policy), lambda name: None, random.Random(1))
    among = CandidateSet([Candidate(one) for one in known])
    named = {worker.name: worker for worker in workers}

    async def report() -> None:
        for worker in workers:
            if worker.changed or worker.cache.news:
                worker.reports += 1
                news, worker.cache.news = worker.cache.news, {}
                await placement.report(
                    worker.name, 1, worker.reports, worker.load,
                    [route for route, here in news.items() if here],
                    [route for route, here in news.items() if not here],
                    whole=worker.reports == 1,
                )  # fmt: skip
                worker.changed = False

    reported_at = 0.0
    try:
        await report()
        for number, (now, job) in enumerate(arrivals(jobs, duration_s)):
            while reported_at + REPORT_S <= now:
                reported_at += REPORT_S
                for worker in workers:
                    worker.advance(reported_at)
                await report()
            for worker in workers:
                worker.advance(now)
            if policy == "round-robin":
                worker = workers[number % count]
            else:
                worker = named[await _chosen(chooser, among, job)]
            worker.queue.append((job, now))
            worker.advance(now)
            worker.changed = True
        for worker in workers:
            worker.advance(float("inf"))
    finally:
        for worker in workers:
            await placement.leave(worker.name, 1)
        await chooser.close()
    return _result(policy, workers)


async def _chosen(chooser: Chooser, among: CandidateSet, job: Job) -> str:
    """The worker that a router chooses for the job."""
    done: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
    chooser.pick(among, Need(job.length, lambda: job.routes), done.set_result)
    verdict = await done
    if verdict.how == OWN_VIEW:
        raise BenchError("Redis was too slow for a choice.")
    return verdict.candidate.worker.worker_id


def _result(policy: str, workers: Sequence[Worker]) -> Result:
    times = sorted(moment for worker in workers for moment in worker.first_tokens)
    hits, computed = sum(w.hits for w in workers), sum(w.computed for w in workers)
    return Result(
        policy,
        hits / (hits + computed),
        max(w.work for w in workers) / max(1, min(w.work for w in workers)),
        statistics.median(times) * 1000,
        times[int(len(times) * 0.99)] * 1000,
    )


async def compare(
    url: str,
    jobs: Sequence[Job],
    count: int,
    capacity: int,
    busy: float,
    policies: Sequence[str] = POLICIES,
) -> tuple[float, list[Result]]:
    """The ideal hit rate, and what each policy makes of the same jobs."""
    hits, computed = ideal(jobs, capacity * count)
    duration_s = computed / TOKENS_PER_S / count / busy
    results = [
        await simulate(url, policy, jobs, count, capacity, duration_s) for policy in policies
    ]
    return hits / (hits + computed), results


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trace", type=Path, default=MOONCAKE)
    parser.add_argument("--requests", type=int, default=400, help="0: all of the trace")
    parser.add_argument("--cache", type=int, default=65_536, help="tokens per worker")
    parser.add_argument("--busy", type=float, default=0.5, help="share of the time, at ideal hits")
    parser.add_argument(
        "--policies", nargs="+", default=POLICIES, choices=POLICIES, help="(default: all)"
    )
    parser.add_argument("--scale", type=int, default=SCALE, help="lengths are divided by it")
    parser.add_argument("--systems", type=int, default=SYSTEM_PROMPTS, help="system prompts")
    arguments = parser.parse_args()
    if not 1 <= arguments.scale <= MOONCAKE_BLOCK or arguments.systems < 1:
        parser.error(f"--scale takes 1 to {MOONCAKE_BLOCK}, --systems at least 1.")
    jobs = read_jobs(arguments.trace, arguments.requests, arguments.scale, arguments.systems)
    folder = private_folder()
    redis = private_redis(folder, folder / "redis.log")
    child = start(redis.command)
    try:
        await until_answering(redis.url, child)
        best, results = await compare(
            redis.url,
            jobs,
            arguments.workers,
            arguments.cache // BLOCK,
            arguments.busy,
            arguments.policies,
        )
    finally:
        await stop([child], 2.0)
        shutil.rmtree(folder)
    print(
        f"{len(jobs)} requests, {arguments.workers} workers; one worker with all the cache would "
        f"have {best:.1%} hits"
    )
    print(f"{'policy':<12}{'hits':>8}{'of ideal':>10}{'max/min work':>14}"
          f"{'TTFT p50 ms':>13}{'p99 ms':>9}")  # fmt: skip
    for one in results:
        print(
            f"{one.policy:<12}{one.hit_rate:>8.1%}{one.hit_rate / best:>10.1%}{one.balance:>14.2f}"
            f"{one.ttft_p50_ms:>13.1f}{one.ttft_p99_ms:>9.1f}"
        )


if __name__ == "__main__":
    asyncio.run(main())
