"""Halves of transports that interfere at the moments that count, for tests of two pools.

Checksums hide two kinds of mistake: a copy that is used although its lease had ended, and blocks
that go back to the pool while they are being read. So here tickets are ended just there, by the
threads that read: after the last byte of a copy, and in the middle of a send.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import (
    HOST_SUMS,
    Pool,
)
from pdserve.kv_transfer.transports import (
    Arriving,
    SinkHalf,
    SourceHalf,
)
from pdserve.protocol.transfer import Fetch, FetchHeader

OFTEN = 0.1
"""How often a piece is interfered with."""
WAIT_S = 0.02
"""How long the driver waits for a read that may have nothing to read."""
LINGER_S = 0.005
"""How long a reader of a growing ticket stays, so that its engine may cut it meanwhile."""

Wait = Callable[[], float]


class Meddler:
    """Ends tickets behind everybody's back, and watches who has given blocks back."""

    def __init__(
        self, seed: int, withdraw: Callable[[str], bool], grows: Callable[[str], bool]
    ) -> None:
        """`withdraw(ticket id)` ends a ticket if it is complete; whether it is over then.
        `grows(ticket id)`: whether it is not complete yet."""
        self._withdraw, self._grows = withdraw, grows
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._begun = threading.Condition(self._lock)
        self._reads: Counter[str] = Counter()
        self.pulled: set[str] = set()
        """Tickets that ended between the copy of a piece and the release."""
        self.free: set[str] = set()
        """Tickets whose blocks are the pool's again."""
        self.mistakes: list[str] = []
        self.count: Counter[str] = Counter()

    def freed(self, ticket_id: str) -> None:
        with self._lock:
            self.free.add(ticket_id)

    def reads(self, ticket_id: str) -> int:
        with self._lock:
            return self._reads[ticket_id]

    def await_read(self, ticket_id: str, before: int) -> None:
        """Until one more read of the ticket has begun, if one does."""
        with self._begun:
            self._begun.wait_for(lambda: self._reads[ticket_id] > before, WAIT_S)

    def _now(self) -> bool:
        with self._lock:
            return self._random.random() < OFTEN

    def pull(self, ticket_id: str) -> None:
        """A reader has its copy, and has not said so yet."""
        if self._now() and self._withdraw(ticket_id):
            with self._lock:
                self.pulled.add(ticket_id)
                self.count["pulled"] += 1

    def during(self, ticket_id: str) -> None:
        """A reader looks at the blocks at this moment."""
        with self._begun:
            self._reads[ticket_id] += 1
            self._begun.notify_all()
        if self._grows(ticket_id):
            self.count["early"] += 1
            time.sleep(LINGER_S)
        elif self._now() and self._withdraw(ticket_id):
            self.count["withdrawn in a send"] += 1
        with self._lock:
            if ticket_id in self.free:
                self.mistakes.append(f"the blocks of {ticket_id} were free while they were read")

    def source(self, make: Callable[[Pool], SourceHalf]) -> Callable[[Pool], SourceHalf]:
        return lambda pool: _Source(make(pool), self)

    def sink(self, make: Callable[[Pool], SinkHalf]) -> Callable[[Pool], SinkHalf]:
        return lambda pool: _Sink(make(pool), self)


class _Source:
    def __init__(self, inner: SourceHalf, meddler: Meddler) -> None:
        self._inner, self._meddler = inner, meddler
        self.sums_kind = getattr(inner, "sums_kind", HOST_SUMS)

    def sliced(self, slices: int) -> _Source:
        inner = self._inner.sliced(slices)
        assert inner is not None
        return _Source(inner, self._meddler)

    def objection(self, fetch: Fetch) -> str:
        return self._inner.objection(fetch)

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """If the inner one has its own."""
        sums: Sums = self._inner.digests(block_ids)  # type: ignore[attr-defined]
        return sums

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return self._inner.describe(header, block_ids)

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        self._meddler.during(fetch.ticket_id)
        self._inner.send(line, fetch, block_ids, wait)


class _Sink:
    def __init__(self, inner: SinkHalf, meddler: Meddler) -> None:
        self.borrows = inner.borrows
        self._inner, self._meddler = inner, meddler

    def sliced(self, slices: int) -> _Sink:
        inner = self._inner.sliced(slices)
        assert inner is not None
        return _Sink(inner, self._meddler)

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        yield from self._inner.receive(line, header, targets, wait)
        self._meddler.pull(header.ticket_id)
