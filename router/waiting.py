"""Answers that wait because no worker could take them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

PATIENCE_S = 10.0
"""How long an answer waits for a worker after its own were lost. Longer than a supervisor needs to
start another one, which then tells that it is loading."""


class Waiting(Protocol):
    """What waits."""

    def place(self) -> None:
        """Try again; it may come back here."""

    def nobody_came(self) -> None:
        """There was nobody, and nobody is to be expected."""


class WaitingRoom:
    """Wakes everybody when a worker comes. Without one, an answer gives up after `patience_s`, or,
    while a worker is loading, when its own time is over (its owner sees to that)."""

    def __init__(self, loading: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        self._loading = loading
        self.patience_s = patience_s
        self._timers: dict[Waiting, asyncio.TimerHandle] = {}

    def enter(self, answer: Waiting) -> None:
        """Wait from now on. Idempotent."""
        if answer not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[answer] = loop.call_later(self.patience_s, self._lose, answer)

    def leave(self, answer: Waiting) -> None:
        """It has ended. Idempotent."""
        timer = self._timers.pop(answer, None)
        if timer is not None:
            timer.cancel()

    def wake(self) -> None:
        """Somebody may be there: let everybody try again."""
        for answer in list(self._timers):
            self.leave(answer)
            answer.place()

    def _lose(self, answer: Waiting) -> None:
        del self._timers[answer]
        if self._loading():
            self.enter(answer)
        else:
            answer.nobody_came()
