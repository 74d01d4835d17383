"""A real engine's steps, one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from pdserve.bench.step_times import Engine, Job, Point, Sample, grid
from pdserve.engine.build import build_runner
from pdserve.engine.config import EngineConfig
from pdserve.engine.ports import Chunk
from pdserve.engine.request import Request
from pdserve.protocol.sampling import SamplingParams

REPEATS = 3
LEAST_S = 0.03
"""A step is repeated REPEATS times, and until so much time has gone."""
_OPTIONS = ("kv_cache_memory", "max_num_batched_tokens", "max_num_seqs", "max_model_len",
            "block_size", "dtype", "device", "threads")  # fmt: skip


class Stepper:
    """Builds a worker's engine, and runs the steps of the grid on it."""

    def __init__(self, job: Job) -> None:
        self._rng = random.Random(job.seed)
        wanted = EngineConfig(**{name: getattr(job, name) for name in _OPTIONS})
        self._built = build_runner(Path(job.folder), wanted)
        self._config = config = self._built.config
        self._built.runner.warm_up(config.max_model_len)
        points = grid(job, config.max_model_len, config.num_blocks * config.block_size)
        self._steps = [(point, self._chunks(point)) for point in points]

    def _chunks(self, point: Point) -> list[Chunk]:
        """Requests with tokens and blocks of their own."""
        size, vocab = self._config.block_size, self._built.model.vocab_size
        parts = [*point.prompts, *((context, 1) for context in point.contexts)]
        needed = [-(-(start + length) // size) for start, length in parts]
        free = self._rng.sample(range(self._config.num_blocks), sum(needed))
        found = []
        for number, ((start, length), count) in enumerate(zip(parts, needed, strict=True)):
            end = start + length
            request = Request(
                request_id=str(number),
                token_ids=self._rng.choices(range(vocab), k=end),
                prompt_len=end,
                sampling=SamplingParams(seed=0, max_tokens=1, temperature=0.0),
                deadline=0.0,
                root=b"",
                block_table=[free.pop() for _ in range(count)],
            )
            found.append(Chunk(request, start, length, samples=True))
        return found

    def time_all(self, progress: Callable[[], None]) -> Engine:
        """Each step a few times, in an order of its own."""
        self._rng.shuffle(self._steps)
        samples = []
        for point, chunks in self._steps:
            samples.append(Sample(point, self._seconds(chunks)))
            progress()
        config = self._config
        return Engine(
            device=config.device,
            dtype=config.dtype,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            samples=samples,
        )

    def _seconds(self, chunks: list[Chunk]) -> float:
        """The median."""
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < REPEATS or time.perf_counter() - begun < LEAST_S:
            before = time.perf_counter()
            self._built.runner.execute(chunks)
            times.append(time.perf_counter() - before)
        return sorted(times)[len(times) // 2]

    def any_step(self) -> None:
        """Something to do, for the sake of those beside it."""
        self._built.runner.execute(self._rng.choice(self._steps)[1])

    def close(self) -> None:
        self._built.pool.close()
