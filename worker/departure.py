"""How a worker leaves: at once, or after it has finished what it has.

    STAYS ──order, first signal──► DRAINS ──nothing left, time over, second signal──► leaves
      └──signal, no time to drain──────────────────────────────────────────────────────┘

While it drains it refuses what is new, and routers place nothing there; what others must still
fetch from its outbox is waited for as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

EXIT_LEFT, EXIT_STOPPED = 0, 143
"""It has left as it was told to, or it was ended by a signal in the middle of its work."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What a draining worker still has."""

    requests: int
    tickets: int

    def __bool__(self) -> bool:
        return bool(self.requests or self.tickets)


Farewell = Callable[[Remains], None]


class Departure:
    """One worker's way out. Event loop only; knows nothing of engines."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`grace_s`: what a first signal allows for draining."""
        self._grace_s = grace_s
        self._clock = clock
        self._until: float | None = None
        self._ordered = self._signalled = False
        self._farewells: list[Farewell] = []
        self._changed = asyncio.Event()

    @property
    def begun(self) -> bool:
        return self._until is not None

    @property
    def at_once(self) -> bool:
        """There is no time (left) to drain."""
        return self._until is not None and self._clock() >= self._until

    def order(self, timeout_s: float, farewell: Farewell) -> None:
        """Drain for at most `timeout_s`, or less if it was told so before; `farewell` hears at the
        end what was left."""
        self._ordered = True
        self._farewells.append(farewell)
        self._begin(timeout_s)

    def signal(self) -> None:
        """The first signal drains for the grace, the second one ends it."""
        self._begin(0.0 if self._signalled else self._grace_s)
        self._signalled = True

    def _begin(self, timeout_s: float) -> None:
        until = self._clock() + timeout_s
        self._until = until if self._until is None else min(until, self._until)
        self._changed.set()

    def code(self, remains: Remains) -> int:
        """The exit code. 0 means that nobody needs to start this worker again."""
        done = self._ordered or (self._grace_s > 0 and not remains)
        return EXIT_LEFT if done else EXIT_STOPPED

    def say_farewell(self, remains: Remains) -> None:
        """Tell those who gave the order. Once."""
        farewells, self._farewells = self._farewells, []
        for farewell in farewells:
            farewell(remains)

    async def news(self, within_s: float) -> None:
        """Wait for an order or a signal, at most so long."""
        # asyncio.timeout, as Python 3.11's wait_for may swallow a cancellation.
        try:
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()
