"""Keeps one process running: started, watched, reported when it dies, started again.

start ──► running ──ready──► running, was ready
  ▲          │ dies              │ dies
  │          │ (5 quick deaths,  │
  │          │  or exit 2: up    │
  │          ▼  gives up)        ▼
  └──────── back-off ◄───────────┘

A worker that ends with exit code 0 was told to leave (`pdserve drain`): it is not started again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.cluster.options import EXIT_USAGE
from pdserve.cluster.process import Child, Command, Exit, start
from pdserve.protocol.errors import PdserveError

MAX_EARLY_DEATHS = 5
"""A process that dies so often without ever having been ready will not get well."""
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
QUICK_S = 10.0
"""A child that was ready and lived longer than this died by accident: its successor starts soon."""


class GaveUp(PdserveError):
    """A process that cannot be kept running; `exit_code` is what the launcher ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait after the n-th death in a row."""

    first_s: float = FIRST_BACKOFF_S
    last_s: float = LAST_BACKOFF_S

    def delay_s(self, deaths: int) -> float:
        return min(self.last_s, self.first_s * 2.0 ** min(deaths - 1, 20))


class Supervisor:
    """One process and its successors."""

    def __init__(
        self,
        command: Command,
        report: Callable[[str], None],
        backoff: Backoff = Backoff(),
        *,
        may_leave: bool = False,
    ) -> None:
        """`report` is told, in sentences, of deaths and new starts. `may_leave`: exit code 0 is no
        accident."""
        self.command = command
        self.child: Child | None = None
        self.ready = False
        """The present child has been seen ready."""
        self.left = False
        """It was told to leave, and has."""
        self._report = report
        self._may_leave = may_leave
        self._backoff = backoff
        self._was_ready = False
        self._deaths = 0
        """In a row."""
        self._stopping = False

    @property
    def name(self) -> str:
        return self.command.name

    def mark_ready(self) -> None:
        """The present child does its work."""
        if not self.ready and self._was_ready:
            self._report(f"{self.name} is back.")
        self.ready = self._was_ready = True

    async def run(self) -> None:
        """Until `stop`, until it leaves, or until it is hopeless: then raises GaveUp."""
        while True:
            self.child = self._start()
            end = await self.child.wait()
            was_ready, self.ready = self.ready, False
            if self._stopping:
                return
            if self._may_leave and end.returncode == 0:
                self.left = True
                self._report(f"{self.name} has left as it was told to; it is not started again.")
                return
            if was_ready and end.lifetime_s > QUICK_S:
                self._deaths = 0
            self._deaths += 1
            self._judge(end)
            delay_s = self._backoff.delay_s(self._deaths)
            self._report(self._obituary(end, delay_s))
            await asyncio.sleep(delay_s)

    def _start(self) -> Child:
        try:
            return start(self.command)
        except OSError as error:
            raise GaveUp(
                f"{self.name} cannot be started: {error.strerror} ({self.command.argv[0]}).", 1
            ) from error

    def _judge(self, end: Exit) -> None:
        if self._was_ready:
            return
        if end.returncode == EXIT_USAGE:
            raise GaveUp(end.sentence, EXIT_USAGE)
        if self._deaths >= MAX_EARLY_DEATHS:
            raise GaveUp(
                f"{self.name} died {self._deaths} times before it was ready ({end}); its last "
                "words:\n" + _indented(end.log_lines),
                1,
            )

    def _obituary(self, end: Exit, delay_s: float) -> str:
        words = f"; its last words:\n{_indented(end.log_lines[-5:])}" if end.log_lines else "."
        return f"{self.name} died ({end}); starting it again in {delay_s:g} s{words}"

    def stop(self) -> Child | None:
        """No new starts. Returns the child that still runs, if there is one, not yet signalled."""
        self._stopping = True
        return self.child if self.child is not None and self.child.exit is None else None

    def kill(self) -> None:
        if self.child is not None:
            self.child.signal(signal.SIGKILL)


def _indented(lines: tuple[str, ...]) -> str:
    return "\n".join(f"    {line}" for line in lines)
