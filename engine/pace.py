"""Whether the engine's loop still comes around.

A turn of the loop computes one step at most. What a step may take depends on model and machine, so
it is measured, and on how much it computes: a chunk of a long prompt is no stuck engine, a single
token that takes as long is one. A turn is stuck that takes FACTOR times as long as the slowest ones
so far would let expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FACTOR = 20.0
STEP_TOKENS = 64
"""What a step costs whatever it computes, in tokens of a prompt."""
FORGETTING = 0.999
"""Weight of the slowest turn against the next one: what was slow once counts for some hundreds."""
LEAST_S, MOST_S = 3.0, 120.0
"""No turn is called stuck earlier, none later. Before anything was measured, MOST_S is allowed."""
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
        self._tokens = 0
        self._slowest_s = 0.0
        """Per token, STEP_TOKENS included."""

    def turn(self) -> None:
        """A turn ends, another one begins."""
        now = self._clock()
        took = now - self._began
        if self._tokens and took <= self.allowed_s:
            # Else it was stuck, or the process frozen: no measure of steps.
            self.learn(self._tokens, took)
        self._tokens, self._began = 0, now

    def compute(self, tokens: int) -> None:
        """This turn computes so many tokens."""
        self._tokens = tokens

    def learn(self, tokens: int, took_s: float) -> None:
        """A step of so many tokens has taken so long."""
        slowest = FORGETTING * self._slowest_s
        self._slowest_s = max(slowest, took_s / (STEP_TOKENS + tokens))

    @property
    def allowed_s(self) -> float:
        """Seconds for this turn."""
        if not self._slowest_s:
            return MOST_S
        expected = self._slowest_s * (STEP_TOKENS + self._tokens)
        return min(MOST_S, max(self._least_s, FACTOR * expected))

    @property
    def stuck(self) -> bool:
        """The turn that has begun takes too long."""
        return self._clock() - self._began > self.allowed_s
