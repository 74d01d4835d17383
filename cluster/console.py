"""What `pdserve up` writes: lines that stay, and on a terminal one live line per process."""

from __future__ import annotations

from typing import TextIO

_UP, _CLEAR = "\x1b[{}A", "\x1b[J"
_STEP = 0.25
"""Without a terminal, progress is written once per quarter."""


class Console:
    """Owns the output. A reader that has gone away is no reason to stop serving."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._states: dict[str, str] = {}
        self._written: dict[str, tuple[str, int]] = {}
        self._drawn = 0

    def say(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        self._write(text + "\n")
        self._draw()

    def show(self, name: str, doing: str, share: float | None = None) -> None:
        """What a process is doing now; `share` of it is done, from 0 to 1."""
        text = doing if share is None else f"{doing} {share:.0%}"
        if self._live:
            if self._states.get(name) != text:
                self._states[name] = text
                self._erase()
                self._draw()
            return
        step = (doing, int((share or 0.0) / _STEP))
        if self._written.get(name) != step:
            self._written[name] = step
            self._write(f"{name}: {text}\n")

    def settle(self) -> None:
        """The live lines become lines that stay."""
        self._erase()
        for name, text in self._states.items():
            self._write(f"{name}: {text}\n")
        self._states.clear()

    def _draw(self) -> None:
        if self._states:
            width = max(map(len, self._states))
            lines = [f"  {name:<{width}}  {text}"[:79] for name, text in self._states.items()]
            self._write("\n".join(lines) + "\n")
            self._drawn = len(lines)

    def _erase(self) -> None:
        if self._drawn:
            self._write(_UP.format(self._drawn) + _CLEAR)
            self._drawn = 0

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._live = False
