"""Answers that were launched and have no token yet: what of this router waits at the workers."""

from __future__ import annotations

from collections.abc import Callable


class Unheard:
    """Event loop only."""

    def __init__(self) -> None:
        self._lengths: dict[object, int] = {}
        self._listener: Callable[[], None] = lambda: None
        self.tokens = 0
        """Of their prompts."""

    def __len__(self) -> int:
        return len(self._lengths)

    def listen(self, listener: Callable[[], None]) -> None:
        """`listener` is called when there may be room for one more."""
        self._listener = listener

    def add(self, answer: object, length: int) -> None:
        """It has been launched; its prompt has `length` tokens."""
        self._lengths[answer] = length
        self.tokens += length

    def discard(self, answer: object) -> None:
        """It has its first token, or has ended without. Idempotent."""
        length = self._lengths.pop(answer, None)
        if length is not None:
            self.tokens -= length
            self._listener()

    def ended(self) -> None:
        """Answers have left their workers."""
        self._listener()
