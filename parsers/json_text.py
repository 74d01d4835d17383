"""The text of one JSON object while it comes."""

from __future__ import annotations

import json
import re

MAX_DEPTH = 200
"""Objects and lists inside each other; readers of JSON have limits of their own."""

_BLANKS = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(
    r'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_LONGEST_ESCAPE = 12
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_VALUE = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")

# What may come next outside of strings; the names are those of the first characters that fit.
_VALUES, _VALUES_OR_END, _KEYS, _KEYS_OR_END, _COLON, _COMMA_OR_END = range(6)


class ObjectText:
    """Passes on the text of an object as far as it is JSON and no piece of it is cut. Control
    characters in strings, which models write and JSON forbids, are escaped."""

    def __init__(self) -> None:
        self.complete = False
        """The object has ended."""
        self.broken = False
        """What comes next is no JSON."""
        self._ends: list[str] = []
        """Brackets that will close what is open."""
        self._next = _VALUES
        self._string = self._key = False
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """(what belongs to the object, what stands behind it or where it broke)."""
        text, self._held = self._held + text, ""
        found: list[str] = []
        place = 0
        while place < len(text) and not (self.complete or self.broken):
            step = self._in_string if self._string else self._between
            piece, end = step(text, place)
            if end == place and not self.broken:
                self._held = text[place:]  # the rest of it must come first
                return "".join(found), ""
            found.append(piece)
            place = end
        return "".join(found), text[place:]

    def _in_string(self, text: str, place: int) -> tuple[str, int]:
        if plain := _PLAIN.match(text, place):
            return plain[0], plain.end()
        if text[place] == '"':
            self._string = False
            self._next = _COLON if self._key else _COMMA_OR_END
            return '"', place + 1
        if text[place] != "\\":
            return json.dumps(text[place])[1:-1], place + 1
        if escape := _ESCAPE.match(text, place):
            return escape[0], escape.end()
        self.broken = not _may_become_escape(text[place : place + _LONGEST_ESCAPE])
        return "", place

    def _between(self, text: str, place: int) -> tuple[str, int]:
        end = place + 1
        if (blanks := _BLANKS.match(text, place)) and blanks[0]:
            return blanks[0], blanks.end()
        mark = text[place]
        if word := _WORD.match(text, place):
            if word.end() == len(text):
                return "", place
            self._expect(_VALUE.fullmatch(word[0]) is not None and self._takes_value())
            self._next, end = _COMMA_OR_END, word.end()
        elif mark == '"':
            self._key = self._next in (_KEYS, _KEYS_OR_END)
            self._expect(self._key or self._takes_value())
            self._string = True
        elif mark in "{[":
            self._expect(self._takes_value() and len(self._ends) < MAX_DEPTH)
            self._ends.append("}" if mark == "{" else "]")
            self._next = _KEYS_OR_END if mark == "{" else _VALUES_OR_END
        elif mark in "}]":
            may_end = self._next in (_COMMA_OR_END, _KEYS_OR_END, _VALUES_OR_END)
            self._expect(may_end and self._ends.pop() == mark)
            self._next, self.complete = _COMMA_OR_END, not self._ends and not self.broken
        else:
            wanted = {":": _COLON, ",": _COMMA_OR_END}.get(mark)
            self._expect(self._next == wanted)
            inside_object = bool(self._ends) and self._ends[-1] == "}"
            self._next = _KEYS if mark == "," and inside_object else _VALUES
        return ("", place) if self.broken else (text[place:end], end)

    def _takes_value(self) -> bool:
        return self._next in (_VALUES, _VALUES_OR_END)

    def _expect(self, fits: bool) -> None:
        self.broken = self.broken or not fits


def _may_become_escape(text: str) -> bool:
    """Whether more characters could make an escape of it."""
    return any(
        _ESCAPE.fullmatch(text + one[len(text) :])
        for one in (r"\n", r"\u0000", r"\ud800\udc00")
        if len(text) < len(one)
    )
