"""Which workers, and which pairs of them, are better left alone for a while.

    CLOSED ──too many failures──► OPEN ──pause over──► TRIAL ──an answer──► CLOSED
                                   ▲                     │ failure
                                   └──twice the pause────┘

What counts is a worker's fault: a connection lost under requests, an error of ours (5xx); never
what a client did wrong, a full queue, a refusal to take more, or time that ran out. Blocks that do
not get from one worker to another are the fault of the pair, and of neither of the two.

Whoever is left alone is still taken where there is nobody else.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable

FAILURES = 3
WINDOW_S = 30.0
"""So many failures in a row, or so many lost connections within so long, are too many."""
PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0
TRIAL_S = 10.0
"""A trial without an answer is given up after so long, and another one may be made."""


class _State(enum.Enum):
    CLOSED = enum.auto()
    OPEN = enum.auto()
    TRIAL = enum.auto()


class Breaker:
    """The record of one worker, or of one pair."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed()` is called with each change of state but the end of a pause."""
        self._clock = clock
        self._changed = changed
        self._state = _State.CLOSED
        self._until = 0.0
        """End of the pause or of the trial."""
        self._pause_s = PAUSE_S
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=FAILURES)

    @property
    def shuns(self) -> bool:
        """Whether to leave it alone now. After a pause one request may try."""
        return self._state is not _State.CLOSED and self._clock() < self._until

    def sent(self) -> None:
        """A request goes there."""
        if self._state is not _State.CLOSED and not self.shuns:
            self._state, self._until = _State.TRIAL, self._clock() + TRIAL_S
            self._changed()

    def success(self) -> None:
        """It answered. During a pause that says nothing: the request was there before."""
        self._in_a_row = 0
        if self._state is _State.TRIAL:
            self._state, self._pause_s = _State.CLOSED, PAUSE_S
            self._losses.clear()
            self._changed()

    def failure(self) -> None:
        """It failed a request."""
        self._in_a_row += 1
        if self._state is _State.TRIAL or self._in_a_row >= FAILURES:
            self._trip()

    def loss(self) -> None:
        """Its connection was lost under requests; answers in between do not excuse that."""
        now = self._clock()
        self._losses.append(now)
        many = len(self._losses) == FAILURES and now - self._losses[0] <= WINDOW_S
        if self._state is _State.TRIAL or many:
            self._trip()

    def _trip(self) -> None:
        if self._state is _State.TRIAL:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._state, self._until = _State.OPEN, self._clock() + self._pause_s
        self._changed()


class Pairs:
    """Breakers of the pairs (source, reader) of which a transfer has failed lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = 4096) -> None:
        """`most`: pairs that are remembered."""
        self._clock = clock
        self._most = most
        self._breakers: dict[tuple[str, str], Breaker] = {}

    def shunned(self, source: str) -> set[str]:
        """Readers that had better not fetch from this source."""
        return {
            reader
            for (giver, reader), breaker in self._breakers.items()
            if giver == source and breaker.shuns
        }

    def sent(self, source: str, reader: str) -> None:
        """Blocks are to go from one to the other."""
        if breaker := self._breakers.get((source, reader)):
            breaker.sent()

    def note(self, source: str, reader: str, arrived: bool) -> None:
        """Whether they arrived."""
        pair = (source, reader)
        if not arrived:
            if pair not in self._breakers and len(self._breakers) >= self._most:
                del self._breakers[next(iter(self._breakers))]
            self._breakers.setdefault(pair, Breaker(self._clock)).failure()
        elif breaker := self._breakers.get(pair):
            breaker.success()
            if not breaker.shuns:
                del self._breakers[pair]
