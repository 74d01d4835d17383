"""Whether the engine's loop still comes around.

A turn of the loop computes one step at most. Within a step each layer that is done is a sign of
progress, so that what counts is the time from one sign to the next. What that may take depends on
model and machine, so it is measured, and on how much is computed: a layer of a long chunk is no
stuck engine, a single token that takes as long is one. An engine is stuck that gives no sign for
FACTOR times as long as slow stretches so far would let expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FACTOR = 10.0
STEP_TOKENS = 64
"""What a step costs whatever it computes, in tokens of a prompt."""
RISE, FORGETTING = 0.2, 0.999
"""A turn that is slower than what is held slow counts for a fifth: one that had to wait for a core
does not excuse a stuck one. What is slow again and again counts for hundreds of turns."""
LEAST_S, MOST_S = 2.4, 120.0
"""No stretch is called stuck earlier, none later. Before anything was measured, MOST_S is allowed.
With the first, a worker is out within 3 s: it gives up its lease at once."""
LEAST_ON_CUDA_S = 10.0
"""There a kernel may be compiled in the middle of serving."""


class Pace:
    """Measured by the engine's thread; `stuck` may be asked by any."""

    def __init__(
        self, least_s: float = LEAST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._least_s = least_s
        self._clock = clock
        self._began = clock()
        """When the present stretch did."""
        self._tokens = 0
        self._longest_s = 0.0
        """Of this turn's stretches."""
        self._slow_s = 0.0
        """What is slow for a stretch, per token of its step, STEP_TOKENS included."""

    def turn(self) -> None:
        """A turn ends, another one begins."""
        self.advance()
        if self._tokens:
            self._learn()
        self._tokens, self._longest_s = 0, 0.0

    def compute(self, tokens: int) -> None:
        """This turn computes so many tokens."""
        self._tokens = tokens

    def advance(self) -> None:
        """A part of the turn's work is done."""
        now = self._clock()
        took = now - self._began
        if took <= self.allowed_s:  # else it was stuck, or the process frozen: no measure
            self._longest_s = max(self._longest_s, took)
        self._began = now

    def _learn(self) -> None:
        took, slow = self._longest_s / (STEP_TOKENS + self._tokens), self._slow_s
        if not slow:
            self._slow_s = took
        elif took > slow:
            self._slow_s += RISE * (took - slow)
        else:
            self._slow_s = max(took, FORGETTING * slow)

    @property
    def allowed_s(self) -> float:
        """Seconds for this stretch."""
        if not self._slow_s:
            return MOST_S
        expected = self._slow_s * (STEP_TOKENS + self._tokens)
        return min(MOST_S, max(self._least_s, FACTOR * expected))

    @property
    def stuck(self) -> bool:
        """The stretch that has begun takes too long."""
        return self._clock() - self._began > self.allowed_s
