"""Which workers serve a request: a choice over a snapshot, without effects.

A request can go over a *pair* (prefill worker, then decode worker) or to one *colocated* worker.
The path whose busiest worker has least to do wins; equal ones are drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pdserve.cluster.records import Role

REQUEST_TOKENS = 64
"""What a request that runs or waits is worth, in prompt tokens still to be computed: a decode
step of one request costs about as much as so many tokens of a prefill chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """One live worker, as the router knows it at this moment."""

    worker_id: str
    role: Role
    fingerprint: str = ""
    """Workers with different ones cannot exchange blocks."""
    queued_tokens: int = 0
    """Prompt tokens not yet computed, those that this router has just sent included."""
    requests: int = 0
    """Running, waiting and fetching requests, those just sent included."""
    free_tokens: int | None = None
    """Room in the KV cache, in tokens (None: unknown)."""

    @property
    def load(self) -> int:
        return self.queued_tokens + REQUEST_TOKENS * self.requests


@dataclass(frozen=True, slots=True)
class Path:
    """Where a request's first leg goes: to `first`, and on to a decode worker if `hand_off`."""

    first: WorkerLoad
    hand_off: bool


T = TypeVar("T")


def _draw(options: Sequence[tuple[tuple[int, int], T]], rng: random.Random) -> T | None:
    """One of the options with the smallest cost."""
    if not options:
        return None
    least = min(cost for cost, _ in options)
    return rng.choice([option for cost, option in options if cost == least])


def _cost(worker: WorkerLoad, tokens: int) -> tuple[int, int]:
    """Workers without room for the tokens come last, then the less loaded first."""
    full = worker.free_tokens is not None and worker.free_tokens < tokens
    return int(full), worker.load


def _role(workers: Iterable[WorkerLoad], *roles: Role) -> list[WorkerLoad]:
    return [worker for worker in workers if worker.role in roles]


def _prefer_other(workers: Sequence[WorkerLoad], avoid: Collection[str]) -> Sequence[WorkerLoad]:
    """Without the workers that have just failed, unless there are no others."""
    return [worker for worker in workers if worker.worker_id not in avoid] or workers


def usable(workers: Sequence[WorkerLoad]) -> bool:
    """Whether requests can be served: a colocated worker, or a prefill and a decode worker that
    can exchange blocks."""
    if _role(workers, Role.COLOCATED):
        return True
    prefills = {worker.fingerprint for worker in _role(workers, Role.PREFILL)}
    return any(worker.fingerprint in prefills for worker in _role(workers, Role.DECODE))


def choose_path(
    workers: Sequence[WorkerLoad],
    tokens: int,
    rng: random.Random,
    avoid: Collection[str] = (),
) -> Path | None:
    """The path for a prompt of `tokens` tokens, or None if `workers` are not usable.

    cost(pair) = max over its two workers, cost(colocated) = its own, with
    cost(worker) = (no room for the tokens, queued tokens + REQUEST_TOKENS × requests).
    """
    options: list[tuple[tuple[int, int], Path]] = []
    decodes = _role(workers, Role.DECODE)
    prefills = [
        worker
        for worker in _role(workers, Role.PREFILL)
        if any(worker.fingerprint == other.fingerprint for other in decodes)
    ]
    for worker in _prefer_other(prefills, avoid):
        partners = [other for other in decodes if other.fingerprint == worker.fingerprint]
        partner = min(_cost(other, tokens) for other in _prefer_other(partners, avoid))
        options.append((max(_cost(worker, tokens), partner), Path(worker, True)))
    colocated = _role(workers, Role.COLOCATED)
    if options and all(worker.worker_id in avoid for worker in colocated):
        colocated = []
    elif colocated and all(path.first.worker_id in avoid for _, path in options):
        options = []
    for worker in _prefer_other(colocated, avoid):
        options.append((_cost(worker, tokens), Path(worker, False)))
    return _draw(options, rng)


def choose_decode(
    workers: Sequence[WorkerLoad],
    tokens: int,
    rng: random.Random,
    fingerprint: str | None = None,
    avoid: Collection[str] = (),
) -> WorkerLoad | None:
    """The worker that decodes from here. `fingerprint`: it must be able to fetch blocks of that
    layout. Decode workers come before colocated ones, which have prompts to compute besides."""
    fitting = [
        worker for worker in workers if fingerprint is None or worker.fingerprint == fingerprint
    ]
    candidates = _role(fitting, Role.DECODE)
    if not candidates or all(worker.worker_id in avoid for worker in candidates):
        candidates = candidates + _role(fitting, Role.COLOCATED)
    options = [(_cost(worker, tokens), worker) for worker in _prefer_other(candidates, avoid)]
    return _draw(options, rng)
