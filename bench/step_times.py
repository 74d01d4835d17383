"""Times steps of a real engine, in a process of its own, as a worker would run them:
`python -P -m pdserve.bench.step_times JOB`, where JOB is a `Job` as JSON. Says "ready", then does
what its lines of input say: "time": time all steps, with a line "point" for each, print an `Engine`
as JSON, and go on computing until the next line; "rest": say "ready" and do nothing.

Several of them that begin together measure what workers of one machine leave each other.
"""

from __future__ import annotations

import os
import select
import sys

import msgspec

from pdserve.cluster.cores import thread_settings

TIME, REST, READY, POINT = "time", "rest", "ready", "point"
"""What is said."""
PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
STARTS = (0, 512, 2048)
REQUESTS = (1, 2, 4, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64)
"""At once; behind 8, 16 and 32, tiles of rows begin another one."""
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
    """The median of the repeats."""


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
        for length, count, context in ((64, 4, 256), (64, 16, 256), (256, 4, 256), (256, 16, 256),
                                       (512, 8, 64), (1024, 4, 1024), (16, 16, 256), (256, 1, 1024))
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
    from pdserve.bench.stepper import Stepper

    stepper = Stepper(job)
    print(READY, flush=True)
    while command := sys.stdin.readline().strip():
        if command == REST:
            print(READY, flush=True)
            continue
        found = stepper.time_all(lambda: print(POINT, flush=True))
        print(msgspec.json.encode(found).decode(), flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            stepper.any_step()
    stepper.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
