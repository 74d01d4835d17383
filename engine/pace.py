"""Whether the engine's loop still comes around.

A turn of the loop computes one step at most. What a step may take depends on model and machine, so
it is measured: a turn that takes FACTOR times as long as the longest before it is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FACTOR = 20.0
LEAST_S, MOST_S = 15.0, 120.0
"""No turn is called stuck earlier, none later. Until KNOWN_TURNS have been measured (the first
steps may compile something) MOST_S is allowed."""
KNOWN_TURNS = 50


class Pace:
    """Measured by the engine's thread; `stuck` may be asked by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._turns = 0
        self._longest_s = 0.0

    def turn(self) -> None:
        """A turn ends, another one begins."""
        now = self._clock()
        took = now - self._began
        if took <= self.allowed_s:  # else it was stuck, or the process frozen: no measure of steps
            self._longest_s = max(self._longest_s, took)
        self._turns += 1
        self._began = now

    @property
    def allowed_s(self) -> float:
        """Seconds for one turn."""
        if self._turns < KNOWN_TURNS:
            return MOST_S
        return min(MOST_S, max(LEAST_S, FACTOR * self._longest_s))

    @property
    def stuck(self) -> bool:
        """The turn that has begun takes too long."""
        return self._clock() - self._began > self.allowed_s
