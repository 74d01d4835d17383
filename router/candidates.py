"""Who may take a leg, found out once for as long as nothing changes.

    pool, prices ──change, or MAX_AGE_S──► CandidateSet: candidates, packed for Redis, their ring
                                               │
    request ───────────────────────────────────┴─► at most MOST_ASKED of them, in packed form

What a choice needs of a worker, but for its load, is the same from one request to the next. So a
request pays for its prompt and for the few workers that are asked about, not for the cluster. A
request that has met failures, or has targets of its own, gets a set of its own.
"""

from __future__ import annotations

import functools
import hashlib
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence

from pdserve.cluster.placement import Option, join_options, pack_option
from pdserve.cluster.records import Role
from pdserve.router.placement import (
    FETCH,
    Candidate,
    Disaggregate,
    WorkerLoad,
    decode_options,
    first_options,
)
from pdserve.router.predict import Predictor
from pdserve.router.workers import WorkerPool

MOST_ASKED = 64
"""Workers that one choice is about."""
MAX_AGE_S = 1.0
"""Prices move a little with each request; they are taken anew so often."""
MIXED_AGE_S = 0.05
"""Where colocated workers stand beside others, who hands over depends on the load."""


class CandidateSet:
    """Candidates (maybe none) with what choosing among them takes, found out when first needed."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = tuple(candidates)
        self._packed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.candidates)

    def _options(self, indices: Sequence[int]) -> bytes:
        """Each is packed when it is first asked about."""
        for index in indices:
            if index not in self._packed:
                one = self.candidates[index]
                option = Option(one.worker.worker_id, one.worker.epoch, one.floor, one.price)
                self._packed[index] = pack_option(option)
        return join_options([self._packed[index] for index in indices])

    @functools.cached_property
    def _all(self) -> bytes:
        return self._options(range(len(self.candidates)))

    @functools.cached_property
    def _by_incarnation(self) -> dict[tuple[str, int], Candidate]:
        return {(one.worker.worker_id, one.worker.epoch): one for one in self.candidates}

    def find(self, worker_id: str, epoch: int) -> Candidate | None:
        """That incarnation, if it is one of them."""
        return self._by_incarnation.get((worker_id, epoch))

    @functools.cached_property
    def _ring(self) -> tuple[list[bytes], list[int]]:
        """Digests of the workers' names in order, and whose they are."""
        ring = sorted((_place(one.worker.worker_id.encode()), i) for i, one in
                      enumerate(self.candidates))  # fmt: skip
        return [place for place, _ in ring], [index for _, index in ring]

    def asked(self, key: bytes, rng: random.Random) -> tuple[Sequence[Candidate], bytes]:
        """Those that a choice is about, and the same packed (`cluster.placement.ask`).

        At most MOST_ASKED, so that a choice costs the same however large the cluster is: half are
        the next ones to `key` on a ring (Karger et al. 1997; the same for the same prefix, so that
        what it left in their caches is found again, whoever else comes or goes), half are drawn.
        """
        count = len(self.candidates)
        if count <= MOST_ASKED:
            return self.candidates, self._all
        places, order = self._ring
        first, near = bisect_left(places, _place(key)), MOST_ASKED // 2
        steps = [*range(near), *rng.sample(range(near, count), MOST_ASKED - near)]
        few = [order[(first + step) % count] for step in steps]
        return [self.candidates[index] for index in few], self._options(few)


def _place(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=8).digest()


class Candidates:
    """Those of one router's pool. Event loop only."""

    def __init__(
        self,
        pool: WorkerPool,
        predictor: Predictor,
        disaggregate: Disaggregate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._predictor = predictor
        self._disaggregate = disaggregate
        self._clock = clock
        self._kept: dict[tuple[str, str | None], CandidateSet] = {}
        self._version = -1
        self._until = 0.0

    def for_prompt(self, avoid: Collection[str] = (), slowest_s: float = 0.0) -> CandidateSet:
        """Who may take a prompt; a first token within `slowest_s` is soon enough."""

        def find(workers: Sequence[WorkerLoad]) -> Sequence[Candidate]:
            price_of = self._predictor.price if self._predictor.warm else None
            slowest = slowest_s * 1e6
            return first_options(workers, avoid, self._disaggregate, price_of, slowest)

        return self._made(("prompt", None), find, bool(avoid or slowest_s))

    def for_blocks(self, fingerprint: str, avoid: Collection[str] = ()) -> CandidateSet:
        """Who may fetch blocks of that layout and decode."""
        return self._made(
            ("blocks", fingerprint),
            lambda workers: decode_options(workers, fingerprint, avoid, FETCH),
            bool(avoid),
        )

    def for_rest(self, avoid: Collection[str] = ()) -> CandidateSet:
        """Who may go on with an answer whose worker is lost: by computing prompt and tokens so far,
        or, if the two can be compared, by fetching them from a prefill worker that has most of it
        in its cache."""

        def find(workers: Sequence[WorkerLoad]) -> Sequence[Candidate]:
            if self._disaggregate is Disaggregate.AUTO and self._predictor.warm:
                return first_options(workers, avoid, self._disaggregate, self._predictor.price)
            return decode_options(workers, avoid=avoid)

        return self._made(("rest", None), find, bool(avoid))

    def _made(
        self,
        kind: tuple[str, str | None],
        find: Callable[[Sequence[WorkerLoad]], Sequence[Candidate]],
        special: bool,
    ) -> CandidateSet:
        if special:
            return CandidateSet(find(self._pool.snapshot()))
        now = self._clock()
        if self._version != self._pool.version or now >= self._until:
            self._kept.clear()
        found = self._kept.get(kind)
        if found is None:
            workers = self._pool.snapshot()
            if not self._kept:
                self._version, self._until = self._pool.version, now + _lasts_s(workers)
            self._kept[kind] = found = CandidateSet(find(workers))
        return found


def _lasts_s(workers: Sequence[WorkerLoad]) -> float:
    roles = {worker.role for worker in workers}
    return MIXED_AGE_S if Role.COLOCATED in roles and len(roles) > 1 else MAX_AGE_S
