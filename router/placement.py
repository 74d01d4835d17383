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

import dataclasses
import enum
import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from pdserve.cluster.placement import Price
from pdserve.cluster.records import Role
from pdserve.router.predict import LATER, PriceOf

REQUEST_TOKENS = 64
"""What a request that runs or waits is worth, in prompt tokens still to be computed: a decode
step of one request costs about as much as so many tokens of a prefill chunk."""


COMPUTE = Price(request=REQUEST_TOKENS, later=LATER)
"""In tokens to be computed, as long as nobody knows how long things take here."""
FETCH = Price(token=0.05, request=REQUEST_TOKENS)
"""What is missing is fetched, not computed."""


class Disaggregate(enum.StrEnum):
    """Whether prompts are handed over from a prefill to a decode worker."""

    AUTO = "auto"
    """When that is predicted to cost less than computing them where they are decoded."""
    ALWAYS = "always"
    NEVER = "never"


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
    epoch: int = 0
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
    shunned: bool = False
    """It has failed too often lately; see `breaker.py`."""

    @property
    def load(self) -> int:
        return self.queued_tokens + REQUEST_TOKENS * self.requests


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may take a leg."""

    worker: WorkerLoad
    hand_off: bool = False
    """It computes the prompt and hands it over."""
    floor: float = 0
    """Cost of whoever must go on: a pair is as busy as its busier half."""
    price: Price = COMPUTE

    def with_most_requests(self, count: int) -> Candidate:
        """The same, full when there are so many."""
        price = msgspec.structs.replace(self.price, most_requests=count)
        return dataclasses.replace(self, price=price)

    @property
    def timed(self) -> bool:
        """Costs are predicted µs, not tokens to be computed."""
        return self.price.request != REQUEST_TOKENS


Rank = tuple[int, int]
"""(no room, cost): less is better."""


def rank(candidate: Candidate, tokens: int) -> Rank:
    """The formula of `cluster.placement.Price`, over the numbers that the candidate has."""
    worker, price = candidate.worker, candidate.price
    cached = worker.cached_tokens
    missing = tokens - cached
    cost = (
        price.base
        + price.length * tokens
        + price.queued * worker.queued_tokens
        + price.request * worker.requests
        + missing * (price.token + price.context * (cached + missing / 2))
    )
    others = price.later + price.harm * worker.requests * (price.token + price.context * tokens / 2)
    cost = max(cost, candidate.floor) + missing * others
    full = worker.free_tokens is not None and worker.free_tokens < missing
    return int(full or worker.requests >= price.most_requests), math.floor(cost)


def by_cost(candidates: Sequence[Candidate], tokens: int, draw: int) -> int | None:
    """Policies `prefix` and `least-load`: the index of the least rank; `draw` ≥ 0 decides between
    equal ones."""
    if not candidates:
        return None
    ranks = [rank(candidate, tokens) for candidate in candidates]
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


def _failed(worker: WorkerLoad, avoid: Collection[str]) -> bool:
    return worker.shunned or worker.worker_id in avoid


def _prefer_other(workers: Sequence[WorkerLoad], avoid: Collection[str]) -> Sequence[WorkerLoad]:
    """Without the workers that have just failed, unless there are no others; then rather those that
    fail otherwise than those that have just failed this request."""
    good = [worker for worker in workers if not _failed(worker, avoid)]
    return good or [worker for worker in workers if worker.worker_id not in avoid] or workers


def usable(workers: Sequence[WorkerLoad], disaggregate: Disaggregate = Disaggregate.ALWAYS) -> bool:
    """Whether requests can be served: by a worker that may do everything, or by a prefill and a
    decode worker that can exchange blocks."""
    return bool(first_options(workers, disaggregate=disaggregate))


def first_options(
    workers: Sequence[WorkerLoad],
    avoid: Collection[str] = (),
    disaggregate: Disaggregate = Disaggregate.ALWAYS,
    price_of: PriceOf | None = None,
    slowest: float = 0,
) -> list[Candidate]:
    """Who may take a prompt; empty if `workers` are not usable.

    Under AUTO decode workers may take prompts for themselves if `price_of` tells what that costs,
    or if there is no other way. `slowest`: a first token within so much (in the unit of the prices)
    is soon enough.
    """
    decodes, colocated = _role(workers, Role.DECODE), _role(workers, Role.COLOCATED)
    pairs: list[WorkerLoad] = []
    partners: dict[str, list[WorkerLoad]] = {}
    """By fingerprint, those who can go on behind a prefill worker."""
    if disaggregate is not Disaggregate.NEVER:
        pairs = _role(workers, Role.PREFILL)
        partners = {
            worker.fingerprint: _alike(worker, decodes) or _alike(worker, colocated)
            for worker in {worker.fingerprint: worker for worker in pairs}.values()
        }
        pairs = [worker for worker in pairs if partners[worker.fingerprint]]
    may_stay = disaggregate is not Disaggregate.ALWAYS and (price_of is not None or not pairs)
    alone = colocated + decodes if may_stay else colocated
    if not pairs or not alone:
        price_of = None  # nothing to compare
    if price_of is None:
        slowest = 0
    if pairs and all(_failed(worker, avoid) for worker in alone):
        alone = []
    elif alone and all(_failed(worker, avoid) for worker in pairs):
        pairs = []
    helpers = [] if disaggregate is Disaggregate.NEVER else _prefer_other(decodes, avoid)
    found = []
    for worker in _prefer_other(pairs, avoid):
        price = price_of(worker.worker_id, True) if price_of else COMPUTE
        behind = 0
        if colocated:  # where there are only pairs, what comes behind them is the same for all
            others = _prefer_other(partners[worker.fingerprint], avoid)
            behind = min(other.load for other in others)
        found.append(Candidate(worker, True, max(behind * price.queued, slowest), price))
    for worker in _prefer_other(alone, avoid):
        hand_off = worker.role is Role.COLOCATED and _relieved(worker, helpers)
        price = price_of(worker.worker_id, hand_off) if price_of else COMPUTE
        found.append(Candidate(worker, hand_off, slowest, price))
    return found


def _alike(worker: WorkerLoad, others: Iterable[WorkerLoad]) -> list[WorkerLoad]:
    """Those that can exchange blocks with it."""
    return [other for other in others if other.fingerprint == worker.fingerprint]


def _relieved(worker: WorkerLoad, decodes: Iterable[WorkerLoad]) -> bool:
    """Whether a colocated worker should hand a prompt over: some decode worker has less to do."""
    return any(other.load < worker.load for other in _alike(worker, decodes))


def decode_options(
    workers: Sequence[WorkerLoad],
    fingerprint: str | None = None,
    avoid: Collection[str] = (),
    price: Price = COMPUTE,
) -> list[Candidate]:
    """Who may decode from here. `fingerprint`: they must be able to fetch blocks of that layout.
    Decode workers come before colocated ones, which have prompts to compute besides."""
    fitting = [
        worker for worker in workers if fingerprint is None or worker.fingerprint == fingerprint
    ]
    found = _role(fitting, Role.DECODE)
    if not found or all(_failed(worker, avoid) for worker in found):
        found = found + _role(fitting, Role.COLOCATED)
    return [Candidate(worker, price=price) for worker in _prefer_other(found, avoid)]
