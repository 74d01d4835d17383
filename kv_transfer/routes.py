"""Which transports to try with a source, best first, and what became of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from pdserve.protocol.ticket import KVTicket

UNFIT_S = 60.0
"""A transport that did not work with a source is not tried again for so long."""
ROUTES_KEPT = 32
"""Sources of which the transport is remembered, for people who ask."""


class Routes:
    """Thread-safe. `names`: the transports of this side, best first."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._lock = threading.Lock()
        self._unfit: dict[tuple[str, int, str], float] = {}
        """(source, epoch, transport) → when it may be tried again."""
        self._used: dict[str, str] = {}

    def plan(self, ticket: KVTicket) -> list[str]:
        """The transports to try, best first; those known to be unfit for this source are out,
        unless nothing else is left."""
        common = [name for name in self.names if name in ticket.transports]
        now = time.monotonic()
        with self._lock:
            fit = [
                name
                for name in common
                if self._unfit.get((ticket.source, ticket.epoch, name), 0.0) <= now
            ]
        return fit or common

    def avoid(self, ticket: KVTicket, name: str) -> None:
        """Do not try a transport with this source for a while."""
        now = time.monotonic()
        with self._lock:
            self._unfit = {key: until for key, until in self._unfit.items() if until > now}
            self._unfit[(ticket.source, ticket.epoch, name)] = now + UNFIT_S

    def note(self, source: str, name: str) -> None:
        """All blocks of a fetch came from the source over this transport."""
        with self._lock:
            self._used.pop(source, None)
            self._used[source] = name
            if len(self._used) > ROUTES_KEPT:
                del self._used[next(iter(self._used))]

    def used(self) -> dict[str, str]:
        """Source → the transport that last brought all the blocks of a fetch from it."""
        with self._lock:
            return dict(self._used)
