"""Which transports to try with a source, best first: by capability, then by measured speed.

The first transport that both sides have is the best one until another is found clearly faster. To
find that out each of the others carries one large fetch, once in a long while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pdserve.protocol.ticket import KVTicket

UNFIT_S = 60.0
"""A transport that did not work with a source is not tried again for so long."""
SOURCES_KEPT = 64
"""Sources of which speeds and the transport last used are remembered."""
MEASURED_BYTES = 4 * 2**20
"""What moves less says nothing about speed."""
WEIGHT = 0.3
"""Of the newest measurement in the average."""
FASTER = 1.25
"""By how much a transport must be faster to be preferred to one that is better by capability."""
AGAIN_S = 600.0
"""An alternative is measured again after so long."""

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """The transports to one source. No clock, no lock: times are given."""

    speeds: dict[str, float] = field(default_factory=dict)
    """Transport → bytes per second, an average in which old measurements fade."""
    _tried: dict[str, float] = field(default_factory=dict)
    """Transport → when it was last chosen for a fetch that measures."""

    def note(self, name: str, nbytes: int, seconds: float) -> None:
        """So many bytes have moved in so many seconds."""
        if nbytes < MEASURED_BYTES or seconds <= 0.0:
            return
        speed = nbytes / seconds
        before = self.speeds.get(name, speed)
        self.speeds[name] = before + WEIGHT * (speed - before)

    def order(self, names: Sequence[str], nbytes: int, now: float) -> list[str]:
        """`names` (best first by capability) in the order in which to try them for `nbytes`."""
        if not names:
            return []
        best = self._fastest(names)
        chosen = best
        if nbytes >= MEASURED_BYTES:
            if best in self.speeds:  # else it is its own turn to be measured
                others = [name for name in names if name != best]
                due = [name for name in others if self._due(name, now)]
                chosen = due[0] if due else best
            self._tried[chosen] = now
        rest = [name for name in (best, *names) if name != chosen]
        return [chosen, *dict.fromkeys(rest)]

    def _fastest(self, names: Sequence[str]) -> str:
        best = names[0]
        for name in names[1:]:
            if best in self.speeds and self.speeds.get(name, 0.0) > FASTER * self.speeds[best]:
                best = name
        return best

    def _due(self, name: str, now: float) -> bool:
        return name not in self._tried or now - self._tried[name] >= AGAIN_S


class Routes:
    """Thread-safe. `names`: the transports of this side, best first by capability."""

    def __init__(self, names: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.names = tuple(names)
        self._clock = clock
        self._lock = threading.Lock()
        self._unfit: dict[tuple[str, int, str], float] = {}
        """(source, epoch, transport) → when it may be tried again."""
        self._choices: dict[str, Choice] = {}
        self._used: dict[str, str] = {}

    def plan(
        self, ticket: KVTicket, nbytes: int, suits: Callable[[str], bool] = lambda name: True
    ) -> list[str]:
        """The transports that suit, to be tried for so many bytes, best first; those known to be
        unfit for this source are out, unless nothing else is left."""
        common = [name for name in self.names if name in ticket.transports and suits(name)]
        now = self._clock()
        with self._lock:
            fit = [
                name
                for name in common
                if self._unfit.get((ticket.source, ticket.epoch, name), 0.0) <= now
            ]
            return self._choice(ticket.source).order(fit or common, nbytes, now)

    def avoid(self, ticket: KVTicket, name: str) -> None:
        """Do not try a transport with this source for a while."""
        now = self._clock()
        with self._lock:
            self._unfit = {key: until for key, until in self._unfit.items() if until > now}
            self._unfit[(ticket.source, ticket.epoch, name)] = now + UNFIT_S

    def measured(self, source: str, name: str, nbytes: int, seconds: float) -> None:
        """An attempt over this transport moved so much in so long, waits for the source aside."""
        with self._lock:
            self._choice(source).note(name, nbytes, seconds)

    def note(self, source: str, name: str) -> None:
        """All blocks of a fetch came from the source over this transport."""
        with self._lock:
            _remember(self._used, source, name)

    def used(self) -> dict[str, str]:
        """Source → the transport that last brought all the blocks of a fetch from it."""
        with self._lock:
            return dict(self._used)

    def speeds(self) -> dict[str, dict[str, float]]:
        """Source → transport → bytes per second, where measured."""
        with self._lock:
            known = self._choices.items()
            return {source: dict(choice.speeds) for source, choice in known if choice.speeds}

    def _choice(self, source: str) -> Choice:
        choice = self._choices.get(source, Choice())
        _remember(self._choices, source, choice)
        return choice


def _remember(memory: dict[str, T], key: str, value: T) -> None:
    """As the newest; the oldest is forgotten when there are too many."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > SOURCES_KEPT:
        del memory[next(iter(memory))]
