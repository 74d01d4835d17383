"""What a simulated cluster is asked: the workloads of the other benchmarks, and a trace many times
over."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.bench.arrivals import Arrivals, BenchError, times
from pdserve.bench.simulation.cluster import Arrival
from pdserve.bench.simulation.texts import Prompt, Tokens, of_names, of_tokens
from pdserve.bench.workloads import MOONCAKE_BLOCK, Job, Row, Shape, make, rows_of

TRACES = ("mooncake-conversation", "azure-conv")
SHIFT_S = 60.0
"""A copy of a trace begins up to so much later than the first, so that the arrivals of one moment
are spread as those of a larger public would be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A workload and its arrivals."""

    shape: Shape
    arrivals: Arrivals
    seed: int
    block_size: int
    """Of the workers' KV blocks, in tokens."""

    @property
    def traced(self) -> bool:
        return self.shape.kind in TRACES

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, answer) of each request."""
        if self.traced:
            rows = itertools.islice(rows_of(self.shape), self.shape.requests)
            return [(row.input_len, row.output_len) for row in rows]
        return [(len(job.prompt), job.output_len) for job in make(self.shape)]

    def at_rate(self, rate: float) -> Iterator[Arrival]:
        """The workload's requests, `rate` of them per second, as `bench compare` sends them."""
        if self.traced:
            yield from self._trace_at(rate)
        else:
            yield from self._jobs_at(rate)

    def _trace_at(self, rate: float) -> Iterator[Arrival]:
        rows = list(itertools.islice(rows_of(self.shape), self.shape.requests))
        if self.arrivals.kind == "trace":
            span = rows[-1].second if rows else 0.0
            if not span:
                raise BenchError("The trace's requests all come at once; take another --arrivals.")
            dues = [row.second * len(rows) / rate / span for row in rows]
        else:
            dues = times(dataclasses.replace(self.arrivals, rate=rate), len(rows), self.seed)
        for number, (row, due) in enumerate(zip(rows, dues, strict=True)):
            yield Arrival(number, due, self._prompt(row, number, 0), row.output_len)

    def _jobs_at(self, rate: float) -> Iterator[Arrival]:
        jobs = make(self.shape)
        first = [number for number, job in enumerate(jobs) if job.follows is None]
        arrivals = dataclasses.replace(self.arrivals, rate=rate)
        dues = dict(zip(first, times(arrivals, len(first), self.seed), strict=True))
        said: dict[int, tuple[Prompt, list[int]]] = {}
        for number, job in enumerate(jobs):
            tokens = [*_said_before(jobs, number, said), *job.prompt]
            prompt = of_tokens(tokens, self.block_size)
            said[number] = prompt, tokens
            yield Arrival(
                number,
                dues.get(number, 0.0),
                prompt,
                job.output_len,
                job.follows,
                job.think_s,
            )

    def _prompt(self, row: Row, number: int, copy: int) -> Prompt:
        unit = max(1, round(MOONCAKE_BLOCK / self.shape.length_scale))
        names = row.hashes
        if not names:  # nobody knows what they share: nothing
            names = tuple(range(1, -(-row.input_len // unit) + 1))
            copy = number + 1
        return of_names(names, unit, row.input_len, self.block_size, copy)

    def check(self) -> None:
        """Raises BenchError."""
        unit = max(1, round(MOONCAKE_BLOCK / self.shape.length_scale))
        if self.traced and unit % self.block_size and self.block_size % unit:
            raise BenchError(
                f"--block-size ({self.block_size}) must be a multiple or a part of the {unit} "
                "tokens that each of the trace's hashes stands for."
            )

    def replay(self, copies: float) -> Iterator[Arrival]:
        """The whole trace in its own time, `copies` of it at once (0.5: of every second
        conversation). Copies share nothing but what every prompt begins with."""
        whole, part = divmod(copies, 1)
        streams = [self._copy(number) for number in range(int(whole))]
        if part:
            streams.append(self._copy(int(whole), part))
        merged = heapq.merge(*streams, key=lambda entry: entry[0])
        for number, (due, row, copy) in enumerate(merged):
            yield Arrival(number, due, self._prompt(row, number, copy), row.output_len)

    def _copy(self, number: int, share: float = 1.0) -> Iterator[tuple[float, Row, int]]:
        """(second, row, copy) of one copy, or of a share of its conversations."""
        shift = random.Random(f"{self.seed}/{number}").random() * SHIFT_S if number else 0.0
        for index, row in enumerate(rows_of(self.shape)):
            # The second hash is the conversation's; where there are none each request is one.
            name = row.hashes[min(1, len(row.hashes) - 1)] if row.hashes else index
            if share == 1.0 or random.Random(f"{self.seed}/{name}").random() < share:
                yield row.second + shift, row, number


def _said_before(
    jobs: list[Job], number: int, said: dict[int, tuple[Prompt, list[int]]]
) -> list[int]:
    """What a later turn of a conversation begins with: the turn before and its answer."""
    before = jobs[number].follows
    if before is None:
        return []
    prompt, tokens = said.pop(before)
    return [*tokens, *Tokens(prompt, before).answer(jobs[before].output_len)]
