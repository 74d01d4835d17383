"""Times steps of a real engine, in a process of its own, as a worker would run them:
`python -P -m pdserve.bench.step_times JOB`, where JOB is a `Job` as JSON. Says "ready", waits for a
line, times, prints one JSON list of `Sample`s.

Several of them that begin together measure what workers of one machine leave each other.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import msgspec

from pdserve.cluster.cores import thread_settings

REPEATS = 5
LEAST_S = 0.05
"""A point is repeated REPEATS times, and until so much time has gone."""
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
STARTS = (0, 512, 2048)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024)


class Point(msgspec.Struct, frozen=True):
    """What one step computes: chunks of prompts as (start, length), and single tokens behind so
    many others."""

    prompts: tuple[tuple[int, int], ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.prompts)

    @property
    def pairs(self) -> float:
        return sum(length * (start + length / 2) for start, length in self.prompts)


class Sample(msgspec.Struct, frozen=True):
    point: Point
    seconds: float
    """The median."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    folder: str
    cpus: tuple[int, ...]
    """Cores to run on; none: all."""
    threads: int
    seed: int
    kv_cache_memory: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    dtype: str = "auto"
    device: str = "auto"


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, with every "auto" resolved."""

    device: str
    dtype: str
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    samples: list[Sample] = []


def grid(job: Job, longest: int, tokens: int) -> list[Point]:
    """The steps that are timed: prompts alone, tokens alone, both; as far as requests may be so
    long (`longest`) and the pool holds so many tokens. Steps larger than a worker's by itself are
    among them, so that other limits can be simulated."""
    most = job.max_num_batched_tokens or PROMPTS[-1]
    points = [
        Point(prompts=((start, length),))
        for length in PROMPTS
        for start in STARTS
        if length <= most
    ]
    points += [Point(prompts=((0, 64),) * 4), Point(prompts=((0, 256),) * 2)]
    alone = [
        Point(contexts=(context,) * count)
        for count in REQUESTS
        for context in CONTEXTS
        if count <= job.max_num_seqs
    ]
    mixed = [
        Point(prompts=((0, length),), contexts=(context,) * count)
        for length, count, context in ((64, 4, 256), (256, 4, 256), (256, 16, 256), (512, 8, 64),
                                       (1024, 4, 1024), (16, 16, 256), (256, 1, 1024))
        if length + count <= most and count <= job.max_num_seqs
    ]  # fmt: skip

    def fits(point: Point) -> bool:
        lengths = [start + length for start, length in point.prompts]
        lengths += [context + 1 for context in point.contexts]
        blocks = sum(-(-length // job.block_size) for length in lengths)
        return max(lengths) <= longest and blocks * job.block_size <= tokens

    return [point for point in points + alone + mixed if fits(point)]


def main() -> int:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    os.environ.update(thread_settings(job.threads))
    # Only now: libraries size their thread pools when they are loaded.
    from pdserve.engine.build import build_runner
    from pdserve.engine.config import EngineConfig
    from pdserve.engine.ports import Chunk
    from pdserve.engine.request import Request
    from pdserve.protocol.sampling import SamplingParams

    names = ("kv_cache_memory", "max_num_batched_tokens", "max_num_seqs", "max_model_len",
             "block_size", "dtype", "device", "threads")  # fmt: skip
    config = EngineConfig(**{name: getattr(job, name) for name in names})
    built = build_runner(Path(job.folder), config)
    config, vocab = built.config, built.model.vocab_size
    built.runner.warm_up(config.max_model_len)
    rng, sampling = random.Random(job.seed), SamplingParams(seed=0, max_tokens=1, temperature=0.0)

    def chunks(point: Point) -> list[Chunk]:
        free = rng.sample(range(config.num_blocks), config.num_blocks)
        parts = [*point.prompts, *((context, 1) for context in point.contexts)]
        found = []
        for number, (start, length) in enumerate(parts):
            end = start + length
            request = Request(
                request_id=str(number), token_ids=rng.choices(range(vocab), k=end), prompt_len=end,
                sampling=sampling, deadline=0.0, root=b"",
                block_table=[free.pop() for _ in range(-(-end // config.block_size))],
            )  # fmt: skip
            found.append(Chunk(request, start, length, samples=True))
        return found

    points = grid(job, config.max_model_len, config.num_blocks * config.block_size)
    rng.shuffle(points)
    print("ready", flush=True)
    sys.stdin.readline()
    samples = []
    for point in points:
        step = chunks(point)
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < REPEATS or time.perf_counter() - begun < LEAST_S:
            before = time.perf_counter()
            built.runner.execute(step)
            times.append(time.perf_counter() - before)
        samples.append(Sample(point, sorted(times)[len(times) // 2]))
        print("point", flush=True)
    found = Engine(
        device=config.device, dtype=config.dtype, num_blocks=config.num_blocks,
        block_size=config.block_size, max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens, samples=samples,
    )  # fmt: skip
    print(msgspec.json.encode(found).decode(), flush=True)
    built.pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
