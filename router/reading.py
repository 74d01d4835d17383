"""How one answer's text is read: thoughts, text for the client, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdserve.parsers.calls import Call, CallFormat, CallParser
from pdserve.parsers.reasoning import ReasoningFormat, ReasoningParser


@dataclass(slots=True)
class Read:
    """What a piece of text has brought."""

    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)
    """Whole ones, or pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What to look for in the answers of a request."""

    calls: CallFormat | None = None
    schemas: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Parameters of the tools, by name."""
    one_call: bool = False
    """Only the first call counts."""
    pieces: bool = False
    """Calls are wanted while they are written."""
    reasoning: ReasoningFormat | None = None
    """Answers begin with thoughts."""
    show_thoughts: bool = True
    kept: frozenset[int] = frozenset()
    """Special tokens that are marks: their text must reach the parsers."""

    def reader(self) -> Reader:
        """A fresh one for an answer."""
        return Reader(self)


class Reader:
    """Reads one answer."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._thoughts = ReasoningParser(reading.reasoning) if reading.reasoning else None
        self._calls = (
            CallParser(reading.calls, reading.schemas, reading.pieces) if reading.calls else None
        )
        self.called = 0
        """Calls so far."""

    @property
    def thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.thinking

    @property
    def calling(self) -> bool:
        """What is being read may become a call."""
        return self._calls is not None and self._calls.inside

    def feed(self, text: str) -> Read:
        read = Read()
        if self._thoughts is not None:
            thoughts, text = self._thoughts.feed(text)
            read.thoughts = thoughts if self._reading.show_thoughts else ""
        self._answer(text, read)
        return read

    def finish(self) -> Read:
        read = Read()
        if self._thoughts is not None:
            thoughts, text = self._thoughts.finish()
            read.thoughts = thoughts if self._reading.show_thoughts else ""
            self._answer(text, read)
        if self._calls is not None:
            self._take(self._calls.finish(), read)
        return read

    def _answer(self, text: str, read: Read) -> None:
        if self._calls is None:
            read.text += text
        elif text:
            self._take(self._calls.feed(text), read)

    def _take(self, events: list[str | Call], read: Read) -> None:
        for event in events:
            if isinstance(event, str):
                read.text += event
                continue
            self.called += bool(event.name)
            if self.called == 1 or not self._reading.one_call:
                read.calls.append(event)
