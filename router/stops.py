"""Finding stop strings in text that arrives in pieces.

Which stop string wins does not depend on how the text was cut: the one that is complete first
does, and of those that end at the same character the longest.
"""

from __future__ import annotations


class StopScanner:
    """Passes text through, holding back what may be the beginning of a stop string.

    Nothing after `feed` returned a match may be fed.
    """

    __slots__ = ("_held", "_include", "_longest", "_stops")

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """`stops`: non-empty strings. `include`: a match belongs to the text."""
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is free to go, the stop string that was completed or None)."""
        if not self._stops or not text:
            return text, None
        buffer = self._held + text
        match = self._first_match(buffer, len(self._held))
        if match is not None:
            start, stop = match
            self._held = ""
            return buffer[: start + len(stop) if self._include else start], stop
        hold = self._held_back(buffer)
        self._held = buffer[len(buffer) - hold :]
        return buffer[: len(buffer) - hold], None

    def flush(self) -> str:
        """The rest: a near miss, released at the end."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, seen: int) -> tuple[int, str] | None:
        """(start, stop) of the match that ends first; matches end after character `seen`."""
        best: tuple[int, int] | None = None
        chosen = ""
        for stop in self._stops:
            start = buffer.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best, chosen = (start + len(stop), start), stop
        return None if best is None else (best[1], chosen)

    def _held_back(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string (never a whole one)."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
