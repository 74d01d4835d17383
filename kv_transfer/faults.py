"""Faults on demand, over any transport: what a bad network or a bad host would do to blocks.

A specification is text: `seed=7,flip=0.1,drop=0.05,delay=0.2,delay_s=0.01`. Each fault has a
probability per piece (the answer to one `Fetch`); the same seed gives the same draws in the same
order. For developers and tests; nothing here is active unless it is asked for.

    delay      the piece comes `delay_s` seconds late
    drop       the connection is lost instead
    truncate   the connection is lost somewhere in the piece
    duplicate  one block's bytes arrive in the place of another one, too
    reorder    two blocks arrive in each other's place
    flip       one bit of one block arrives as its opposite

The source's half delays, drops and truncates; the sink's half does all six, after the bytes have
arrived and before anybody looks at them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from pdserve.kernels.digest import Bytes, Sums
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import (
    HOST_SUMS,
    Pool,
)
from pdserve.kv_transfer.transports import (
    PIECES,
    Arriving,
    Receiver,
    SinkHalf,
    SourceHalf,
    Unpacking,
    Wait,
)
from pdserve.protocol.errors import PdserveError, ProtocolError
from pdserve.protocol.transfer import Fetch, FetchHeader

log = logging.getLogger(__name__)

MANY_BLOCKS = ("duplicate", "reorder")
"""Faults that need two blocks of a piece at once."""


class FaultsError(PdserveError):
    """A specification that cannot be understood."""


class InjectedLoss(ConnectionError):
    """The connection is lost on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per piece, from 0 to 1."""

    delay: float = 0.0
    drop: float = 0.0
    truncate: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    flip: float = 0.0
    delay_s: float = 0.01
    """Seconds."""
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Faults:
        """Raises FaultsError with a sentence."""
        known = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.partition("=")
            if name not in known:
                raise FaultsError(f"Faults are {', '.join(known)}. Given: {part!r}.")
            try:
                values[name] = int(number) if name == "seed" else float(number)
            except ValueError:
                raise FaultsError(f"The fault {name} needs a number. Given: {part!r}.") from None
            if name != "seed" and not 0 <= values[name] <= (60 if name == "delay_s" else 1):
                limit = "60 seconds" if name == "delay_s" else "1"
                raise FaultsError(f"The fault {name} must be from 0 to {limit}. Given: {part!r}.")
        return cls(**values)  # type: ignore[arg-type]


class Dice:
    """Draws faults. Thread-safe; `count` says what was drawn so far."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.count: Counter[str] = Counter()
        self._random = random.Random(faults.seed)
        self._lock = threading.Lock()

    def draw(self, *names: str) -> set[str]:
        """Those of the faults that happen now."""
        with self._lock:
            drawn = {name for name in names if self._random.random() < getattr(self.faults, name)}
            self.count.update(drawn)
        if drawn:
            log.info("Injected faults: %s.", ", ".join(sorted(drawn)))
        return drawn

    def below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)

    def two_of(self, count: int) -> tuple[int, int]:
        with self._lock:
            first, second = self._random.sample(range(count), 2)
        return first, second


class FaultySource:
    """A source's half that loses connections and is late."""

    def __init__(self, inner: SourceHalf, dice: Dice) -> None:
        self._inner, self._dice = inner, dice
        self.sums_kind = getattr(inner, "sums_kind", HOST_SUMS)

    def sliced(self, slices: int) -> Self | None:
        inner = self._inner.sliced(slices)
        return None if inner is None else type(self)(inner, self._dice)

    def objection(self, fetch: Fetch) -> str:
        return self._inner.objection(fetch)

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """If the inner one has its own."""
        sums: Sums = self._inner.digests(block_ids)  # type: ignore[attr-defined]
        return sums

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return self._inner.describe(header, block_ids)

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        drawn = self._dice.draw("delay", "drop", "truncate")
        if "delay" in drawn:
            time.sleep(self._dice.faults.delay_s)
        if "drop" in drawn:
            raise InjectedLoss("The connection was dropped on purpose.")
        if "truncate" in drawn:
            self._inner.send(line, fetch, block_ids[: self._dice.below(len(block_ids))], wait)
            raise InjectedLoss("The blocks were cut short on purpose.")
        self._inner.send(line, fetch, block_ids, wait)


class FaultyParcelSource(FaultySource):
    """One over which parcels can travel."""

    def describe_parcels(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        described: FetchHeader = self._inner.describe_parcels(  # type: ignore[attr-defined]
            header, block_ids
        )
        return described

    def send_parcels(self, line: Line, parcels: Bytes, wait: Wait) -> None:
        drawn = self._dice.draw("delay", "drop", "truncate")
        send = self._inner.send_parcels  # type: ignore[attr-defined]
        if "delay" in drawn:
            time.sleep(self._dice.faults.delay_s)
        if "drop" in drawn:
            raise InjectedLoss("The connection was dropped on purpose.")
        if "truncate" in drawn:
            send(line, parcels[: self._dice.below(len(parcels))], wait)
            raise InjectedLoss("The parcels were cut short on purpose.")
        send(line, parcels, wait)


class FaultyReceiver:
    """One whose blocks arrive late, incomplete, twice, in disorder or changed."""

    def __init__(self, inner: Receiver, pool: Pool, dice: Dice) -> None:
        self.borrows = inner.borrows
        self.pieces = getattr(inner, "pieces", PIECES)
        self._inner, self._pool, self._dice = inner, pool, dice
        self._digests = getattr(inner, "digests", pool.digests)

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        drawn = self._dice.draw("delay", "drop", "truncate", "flip")
        if len(targets) > 1:
            drawn |= self._dice.draw(*MANY_BLOCKS)
        if "delay" in drawn:
            time.sleep(self._dice.faults.delay_s)
        if "drop" in drawn:
            raise InjectedLoss("The connection was dropped on purpose.")
        end = self._dice.below(len(targets)) if "truncate" in drawn else len(targets)
        complete, spoils = 0, bool(drawn.intersection((*MANY_BLOCKS, "flip")))
        for sums in self._inner.receive(line, header, targets, wait):
            complete += len(sums)
            if complete > end:
                raise ProtocolError("The blocks were cut short on purpose.")
            if not spoils:
                yield sums
        if spoils:
            self._spoil(drawn, targets)
            yield self._digests(targets)

    def _spoil(self, drawn: set[str], targets: Sequence[int]) -> None:
        if "duplicate" in drawn:
            here, there = self._dice.two_of(len(targets))
            self._put(targets[there], self._get(targets[here]))
        if "reorder" in drawn:
            one, other = (targets[index] for index in self._dice.two_of(len(targets)))
            kept = self._get(one)
            self._put(one, self._get(other))
            self._put(other, kept)
        if "flip" in drawn:
            target = targets[self._dice.below(len(targets))]
            block = self._get(target)
            block[self._dice.below(len(block))] ^= 1 << self._dice.below(8)
            self._put(target, block)

    def _get(self, block: int) -> Bytes:
        return self._pool.read(block).copy()

    def _put(self, block: int, content: Bytes) -> None:
        with self._pool.write(block) as part:
            part[:] = content


class FaultySink(FaultyReceiver):
    """A sink's half like that."""

    _inner: SinkHalf

    def sliced(self, slices: int) -> Self | None:
        inner = self._inner.sliced(slices)
        return None if inner is None else type(self)(inner, self._pool.sliced(slices), self._dice)

    def detail(self, source: str, epoch: int) -> str:
        ask = getattr(self._inner, "detail", None)
        return ask(source, epoch) if ask else ""

    def reaches(self, source: str) -> bool:
        ask = getattr(self._inner, "reaches", None)
        return ask is None or ask(source)


class FaultyParcelSink(FaultySink):
    """One over which parcels can travel. What is spoiled are the blocks that they went into."""

    def unpacking(self, job: Unpacking) -> Receiver:
        inner: Receiver = self._inner.unpacking(job)  # type: ignore[attr-defined]
        return FaultyReceiver(inner, self._pool, self._dice)


def faulty_source(
    halves: Mapping[str, Callable[[Pool], SourceHalf]], dice: Dice
) -> dict[str, Callable[[Pool], SourceHalf]]:
    """The same transports with faults on the source's side."""

    def over(make: Callable[[Pool], SourceHalf]) -> Callable[[Pool], SourceHalf]:
        def faulty(pool: Pool) -> FaultySource:
            inner = make(pool)
            kind = FaultyParcelSource if hasattr(inner, "send_parcels") else FaultySource
            return kind(inner, dice)

        return faulty

    return {name: over(make) for name, make in halves.items()}


def faulty_sink(
    halves: Mapping[str, Callable[[Pool], SinkHalf]], dice: Dice
) -> dict[str, Callable[[Pool], SinkHalf]]:
    """The same transports with faults on the sink's side."""

    def over(make: Callable[[Pool], SinkHalf]) -> Callable[[Pool], SinkHalf]:
        def faulty(pool: Pool) -> FaultySink:
            inner = make(pool)
            kind = FaultyParcelSink if hasattr(inner, "unpacking") else FaultySink
            return kind(inner, pool, dice)

        return faulty

    return {name: over(make) for name, make in halves.items()}
