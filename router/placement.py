"""Which workers serve a request: choices over snapshots, without effects.

A request can go over a *pair* (prefill worker, then decode worker) or to one *colocated* worker:
`first_options` and `decode_options` say who may be chosen, a policy says who is.

| policy | chosen |
| --- | --- |
| `prefix` | least cost: load + what of the prompt is missing from the worker's prefix cache |
| `least-load` | least cost if nothing were cached |
| `round-robin` | one after the other |
| `session` | the same one for the same `x-session-id`, whoever else comes or goes |

A worker without room for the tokens comes last under every policy. Equal ones are drawn at random.
`cluster.placement` does the first two over the load that all routers share, in the same way.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pdserve.cluster.records import Role

REQUEST_TOKENS = 64
"""What a request that runs or waits is worth, in prompt tokens still to be computed: a decode
step of one request costs about as much as so many tokens of a prefill chunk."""


FETCH_COST = 0.05
"""What a token whose KV has to be fetched is worth, in tokens to be computed."""


class Policy(enum.StrEnum):
    """How one of several workers is chosen."""

    PREFIX = "prefix"
    LEAST_LOAD = "least-load"
    ROUND_ROBIN = "round-robin"
    SESSION = "session"


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
    cached_tokens: int = 0
    """Longest prefix of the prompt at hand that its prefix cache holds."""

    @property
    def load(self) -> int:
        return self.queued_tokens + REQUEST_TOKENS * self.requests


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may take a leg."""

    worker: WorkerLoad
    hand_off: bool = False
    """It computes the prompt and hands it over."""
    floor: int = 0
    """Cost of whoever must go on: a pair is as busy as its busier half."""


Rank = tuple[int, int]
"""(no room, cost): less is better."""


def rank(candidate: Candidate, tokens: int, token_cost: float = 1.0) -> Rank:
    """cost = max(queued tokens + REQUEST_TOKENS × requests + token_cost × missing, floor)."""
    worker = candidate.worker
    missing = tokens - worker.cached_tokens
    full = worker.free_tokens is not None and worker.free_tokens < missing
    return int(full), max(worker.load + int(missing * token_cost), candidate.floor)


def by_cost(
    candidates: Sequence[Candidate], tokens: int, draw: int, token_cost: float = 1.0
) -> int | None:
    """Policies `prefix` and (with nothing cached) `least-load`: the index of the least rank;
    `draw` ≥ 0 decides between equal ones."""
    if not candidates:
        return None
    ranks = [rank(candidate, tokens, token_cost) for candidate in candidates]
    least = min(ranks)
    equal = [index for index, found in enumerate(ranks) if found == least]
    return equal[draw % len(equal)]


def by_turn(candidates: Sequence[Candidate], tokens: int, turn: int) -> int | None:
    """Policy `round-robin`: who is next, in the order of names, among those that have room."""
    order = sorted(_with_room(candidates, tokens), key=lambda i: candidates[i].worker.worker_id)
    return order[turn % len(order)] if order else None


def by_session(candidates: Sequence[Candidate], tokens: int, session: str) -> int | None:
    """Policy `session`: rendezvous hashing (Thaler and Ravishankar 1998), so that a worker that
    comes or goes moves only the sessions that are, or were, its own."""

    def weight(index: int) -> bytes:
        name = f"{session}\0{candidates[index].worker.worker_id}"
        return hashlib.blake2b(name.encode(), digest_size=8).digest()

    return max(_with_room(candidates, tokens), key=weight, default=None)


def _with_room(candidates: Sequence[Candidate], tokens: int) -> list[int]:
    """Indices of the candidates that have room, or of all if none has."""
    found = [i for i, candidate in enumerate(candidates) if not rank(candidate, tokens)[0]]
    return found or list(range(len(candidates)))


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


def first_options(workers: Sequence[WorkerLoad], avoid: Collection[str] = ()) -> list[Candidate]:
    """Who may take a prompt; empty if `workers` are not usable."""
    decodes = _role(workers, Role.DECODE)
    colocated = _role(workers, Role.COLOCATED)
    helpers = _prefer_other(decodes, avoid)
    partners = {
        worker.worker_id: _alike(worker, decodes) or _alike(worker, colocated)
        for worker in _role(workers, Role.PREFILL)
    }
    prefills = [worker for worker in workers if partners.get(worker.worker_id)]
    pairs = []
    for worker in _prefer_other(prefills, avoid):
        behind = _prefer_other(partners[worker.worker_id], avoid)
        # Where there are only pairs, what comes behind them is the same for all.
        floor = min(other.load for other in behind) if colocated else 0
        pairs.append(Candidate(worker, True, floor))
    if pairs and all(worker.worker_id in avoid for worker in colocated):
        colocated = []
    elif colocated and all(pair.worker.worker_id in avoid for pair in pairs):
        pairs = []
    return pairs + [
        Candidate(worker, _relieved(worker, helpers)) for worker in _prefer_other(colocated, avoid)
    ]


def _alike(worker: WorkerLoad, others: Iterable[WorkerLoad]) -> list[WorkerLoad]:
    """Those that can exchange blocks with it."""
    return [other for other in others if other.fingerprint == worker.fingerprint]


def _relieved(worker: WorkerLoad, decodes: Iterable[WorkerLoad]) -> bool:
    """Whether a colocated worker should hand a prompt over: some decode worker has less to do."""
    return any(other.load < worker.load for other in _alike(worker, decodes))


def decode_options(
    workers: Sequence[WorkerLoad], fingerprint: str | None = None, avoid: Collection[str] = ()
) -> list[Candidate]:
    """Who may decode from here. `fingerprint`: they must be able to fetch blocks of that layout.
    Decode workers come before colocated ones, which have prompts to compute besides."""
    fitting = [
        worker for worker in workers if fingerprint is None or worker.fingerprint == fingerprint
    ]
    found = _role(fitting, Role.DECODE)
    if not found or all(worker.worker_id in avoid for worker in found):
        found = found + _role(fitting, Role.COLOCATED)
    return [Candidate(worker) for worker in _prefer_other(found, avoid)]
