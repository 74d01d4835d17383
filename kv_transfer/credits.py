"""Credits: how many bytes a sink may have asked for and not yet received, per source and in all.

A piece that is larger than a limit is let through when nothing else counts against that limit, so
that no block is too large to travel.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

LOOK_S = 0.05
"""Who waits for credit looks this often whether it is still wanted."""


class Credits:
    """Thread-safe. Limits in bytes."""

    def __init__(self, per_source: int, in_all: int) -> None:
        """Raises ValueError for limits below one byte."""
        if per_source < 1 or in_all < 1:
            raise ValueError(
                f"Limits of bytes in flight must be at least 1. Given: {per_source}, {in_all}."
            )
        self._per_source, self._in_all = per_source, in_all
        self._used: Counter[str] = Counter()
        self._total = 0
        self._freed = threading.Condition()

    @property
    def in_flight(self) -> int:
        """Bytes asked for and not yet received."""
        with self._freed:
            return self._total

    def account(self, source: str) -> Account:
        return Account(self, source)

    def take(self, source: str, nbytes: int, wait: Callable[[], object] | None) -> bool:
        """Reserve `nbytes`. If they are not to be had now: False without `wait`; else wait for
        them, calling it now and then, until it raises."""
        while True:
            with self._freed:
                if self._has(source, nbytes):
                    self._used[source] += nbytes
                    self._total += nbytes
                    return True
                if wait is None:
                    return False
                self._freed.wait(LOOK_S)
            wait()

    def give(self, source: str, nbytes: int) -> None:
        with self._freed:
            self._used[source] -= nbytes
            self._total -= nbytes
            assert self._total >= 0 <= self._used[source], "credit was given back twice"
            if not self._used[source]:
                del self._used[source]
            self._freed.notify_all()

    def _has(self, source: str, nbytes: int) -> bool:
        used = self._used.get(source, 0)
        fits_source = not used or used + nbytes <= self._per_source
        return fits_source and (not self._total or self._total + nbytes <= self._in_all)


class Account:
    """One attempt's share, given back when the block is left, however that happens."""

    def __init__(self, credits: Credits, source: str) -> None:
        self._credits, self._source, self._taken = credits, source, 0

    def take(self, nbytes: int, wait: Callable[[], object]) -> bool:
        """Reserve; waits only if this attempt has nothing in flight whose arrival would help."""
        taken = self._credits.take(self._source, nbytes, None if self._taken else wait)
        self._taken += nbytes if taken else 0
        return taken

    def give(self, nbytes: int) -> None:
        self._taken -= nbytes
        self._credits.give(self._source, nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._taken:
            self.give(self._taken)
