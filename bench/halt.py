"""Stops one thread of another process, as a debugger does: an engine that is stuck while everything
around it lives. Linux only, and only where the system lets one trace the other (ptrace(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pdserve.bench.arrivals import BenchError

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_ALL_THREADS = 0x40000000  # __WALL
LOOK_S = 0.2


def busiest_thread(pid: int) -> int:
    """The thread, other than the main one, that computed most within LOOK_S."""
    before = _ticks(pid)
    time.sleep(LOOK_S)
    worked = {tid: ticks - before.get(tid, 0) for tid, ticks in _ticks(pid).items() if tid != pid}
    if not any(worked.values()):
        raise BenchError(f"No thread of the process {pid} but its first one computes.")
    return max(worked, key=lambda tid: worked[tid])


def _ticks(pid: int) -> dict[int, int]:
    """Processor time of each thread, in clock ticks; see proc(5), stat."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(task.name)] = int(fields[11]) + int(fields[12])
    return found


@contextlib.contextmanager
def halted(tid: int) -> Iterator[None]:
    """The thread stands still within this context; the calling thread must not change."""
    libc = ctypes.CDLL(None, use_errno=True)

    def trace(request: int) -> None:
        if libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), None, None) < 0:
            reason = os.strerror(ctypes.get_errno())
            raise BenchError(f"The thread {tid} cannot be stopped: {reason}.")

    trace(_SEIZE)
    try:
        trace(_INTERRUPT)
        os.waitpid(tid, _ALL_THREADS)
        yield
    finally:
        with contextlib.suppress(BenchError):  # its process may have been killed
            trace(_DETACH)
