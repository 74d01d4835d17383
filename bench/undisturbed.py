"""Lets a thread come first on its core while it measures: its clock must be read when a byte comes,
and the workers beside it use every core there is."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

POLICY = os.SCHED_RR
PRIORITY = 1
"""The least of the real-time ones: above every ordinary process."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The calling thread runs in real time, where that is allowed, and without pauses of the
    garbage collector. What it starts meanwhile runs as ever. It must sleep now and then: nobody
    else gets its core before."""
    before, given = os.sched_getscheduler(0) | os.SCHED_RESET_ON_FORK, os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, POLICY | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
        os.sched_setscheduler(0, before, given)  # only root may take the flag back


def allowed() -> bool:
    """Whether this process may run in real time."""
    with undisturbed():
        return bool(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == POLICY)
