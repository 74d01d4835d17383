"""Child processes that die with their parent, and whose end is an event.

A child leads a process group of its own. Its end is seen through a pidfd while it is still a
zombie, so that the group can be swept before its number may belong to somebody else.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
TAIL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How to start one process."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)
    """All of its environment. Secrets travel here, never in `argv`."""
    log: Path
    """Standard output and error are appended to this file."""
    stdin: bytes = field(default=b"", repr=False)
    """Written to its standard input, which is then closed. At most a pipe's worth (64 KiB)."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended."""

    returncode: int
    """Exit status, or minus the signal that killed it."""
    lifetime_s: float
    log_lines: tuple[str, ...]
    """The last lines that this incarnation wrote."""

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exit status {self.returncode}"
        with suppress(ValueError):
            return f"killed by {signal.Signals(-self.returncode).name}"
        return f"killed by signal {-self.returncode}"

    @property
    def sentence(self) -> str:
        """What it said last: its last error line, or else its last line."""
        errors = [line for line in self.log_lines if "error: " in line]
        lines = errors or list(self.log_lines) or ["it wrote nothing"]
        return lines[-1].strip()


@dataclass(slots=True, eq=False)
class Child:
    """One running process; made by `start`."""

    command: Command
    pid: int
    _popen: subprocess.Popen[bytes]
    _log_start: int
    _started: float
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    exit: Exit | None = None

    async def wait(self) -> Exit:
        """Its end. Any number of tasks may wait."""
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    def signal(self, number: signal.Signals) -> None:
        """To its whole process group; nothing happens if it has ended."""
        if self.exit is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _on_end(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._popen.wait()
        lines = _tail(self.command.log, self._log_start)
        self.exit = Exit(code, time.monotonic() - self._started, lines)
        self._ended.set()


def die_with(parent: int) -> None:
    """To be called in a new child of the process `parent`: it is killed when that has ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def start(command: Command) -> Child:
    """Start it now. Raises OSError if that cannot be done."""
    parent = os.getpid()
    with command.log.open("ab") as log:
        start_of_log = log.tell()
        popen = subprocess.Popen(
            list(command.argv),
            stdin=subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(command.env),
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
    if popen.stdin is not None:
        with suppress(BrokenPipeError):
            popen.stdin.write(command.stdin)
            popen.stdin.close()
    child = Child(command, popen.pid, popen, start_of_log, time.monotonic())
    pidfd = os.pidfd_open(popen.pid)
    asyncio.get_running_loop().add_reader(pidfd, child._on_end, pidfd)
    return child


async def stop(children: Sequence[Child], grace_s: float) -> None:
    """SIGTERM to all, then SIGKILL to what is left after `grace_s` seconds."""
    for child in children:
        child.signal(signal.SIGTERM)
    waits = [asyncio.create_task(child.wait()) for child in children]
    if not waits:
        return
    try:
        _, late = await asyncio.wait(waits, timeout=grace_s)
        if late:
            for child in children:
                child.signal(signal.SIGKILL)
            await asyncio.wait(late)
    finally:
        for wait in waits:
            wait.cancel()


def _tail(path: Path, start: int, most: int = 20) -> tuple[str, ...]:
    """The last lines written since `start`."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-most:]
