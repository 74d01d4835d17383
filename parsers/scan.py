"""Looks for marks in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class Scanner:
    """Splits text at marks. Text that may be the beginning of a mark is held back."""

    def __init__(self, marks: Sequence[str]) -> None:
        self.marks = marks
        """What is looked for; may be changed between two calls."""
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What stands before the next mark, and that mark; or all that cannot be part of one, and
        None. After a mark the rest waits: call again with ""."""
        text = self._held + text
        found = [(place, -len(mark)) for mark in self.marks if (place := text.find(mark)) >= 0]
        if found:
            place, length = min(found)
            rest = text[place:]
            if any(mark.startswith(rest) and len(mark) > len(rest) for mark in self.marks):
                self._held = rest  # a longer mark may stand here
                return text[:place], None
            self._held = rest[-length:]
            return text[:place], rest[:-length]
        held = max((_overlap(text, mark) for mark in self.marks), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` and is not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
