"""A small load that is always the same: how fast a machine is just now.

Its neighbours decide that on a shared host, where the same step takes a third longer at one minute
than at another. What the load takes beside a measurement tells how fast the machine was meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.client import Run, Server, measure
from pdserve.bench.phases import phases_of
from pdserve.bench.topology import Topology
from pdserve.bench.workloads import Shape, make

ANSWERS = 4
"""At each worker that writes answers, at the same time."""
LENGTH, ANSWER = 64, 96
"""Tokens of their prompts and of themselves."""
FIRST_GAPS = 6
"""Of an answer, in which the prompts of others may be computed: left out."""
PROMPT, PROMPTS = 512, 3
"""Tokens of a prompt that comes alone, and how many of those, one after the other."""
CONTEXT = LENGTH + (FIRST_GAPS + ANSWER) // 2
"""Tokens that an answer has behind it, in the middle of what is measured."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What the load took, in seconds."""

    gap_s: float
    """Between two tokens, mean."""
    prompt_s: float
    """In a worker, for the prompt, median."""


NOBODY = Pace(math.nan, math.nan)
"""Of a server that does not take this load."""


def pace(server: Server, topology: Topology, vocab: tuple[int, int], seed: int) -> Pace:
    """Ask for it; about a second for a small model. Different seeds find nothing of each other in
    the prefix cache. `server` must be asked for timings."""
    answers, prompts = shapes(topology, vocab, seed)
    paced, read = _run(server, answers, answers.requests), _run(server, prompts, 1)
    if any(record.error for run in (paced, read) for record in run.records):
        return NOBODY
    return Pace(
        statistics.fmean(gap for record in paced.records for gap in record.gaps[FIRST_GAPS:]),
        statistics.median(phases_of(record.timings or {})["prefill"] for record in read.records),
    )


def shapes(topology: Topology, vocab: tuple[int, int], seed: int) -> tuple[Shape, Shape]:
    """The answers that come at the same time, and the prompts that come one by one. `seed`: at
    least 0. No prompt begins like another, or the prefix cache would have a part of it."""
    at_once = ANSWERS * (topology.decode + topology.colocated)
    answers = Shape(kind="fixed", requests=at_once, input_len=LENGTH, output_len=ANSWER,
                    vocab=vocab, seed=seed)  # fmt: skip
    prompts = Shape(kind="fixed", requests=PROMPTS, input_len=PROMPT, output_len=1,
                    vocab=vocab, seed=-1 - seed)  # fmt: skip
    return answers, prompts


def _run(server: Server, shape: Shape, at_once: int) -> Run:
    arrivals = Arrivals(kind="closed", concurrency=at_once)
    return measure(server, make(shape), arrivals, seed=shape.seed)


def mean(paces: Iterable[Pace]) -> Pace:
    """Of those that are known."""
    known = [one for one in paces if not math.isnan(one.gap_s)]
    if not known:
        return NOBODY
    return Pace(
        statistics.fmean(one.gap_s for one in known),
        statistics.fmean(one.prompt_s for one in known),
    )
