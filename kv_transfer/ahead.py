"""What a source does before anybody asks: checksums of what was offered, and tickets that say where
their blocks lie (see `ledger.py`)."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.memory import HOST_SUMS, Pool
from pdserve.kv_transfer.outbox import Outbox
from pdserve.kv_transfer.transports import SourceHalf
from pdserve.protocol.ticket import LeaseMark, Place

log = logging.getLogger(__name__)

SUMMED_BYTES = 4 * 2**20
"""Summed at once for a reader, who may be told to stop in between."""
SUMMED_AHEAD_BYTES = 2**20
"""Summed at once while nobody waits."""
SUMMED_AT_ONCE_BYTES = 2**30
"""Both, for a transport that does it on a device."""
NICENESS = 5
"""Of the thread that computes checksums ahead: what the engine computes comes first."""


@dataclass(frozen=True, slots=True)
class Summing:
    """How checksums of blocks are computed."""

    kind: str
    compute: Callable[[Sequence[int]], Sums]
    at_once: int
    """Blocks, for a reader, who may be told to stop in between."""
    ahead: int
    """Blocks, while nobody waits: when a reader comes, the rest is left to it."""


def summing(half: SourceHalf, pool: Pool) -> Summing:
    """The checksums that the other half expects."""
    kind = getattr(half, "sums_kind", HOST_SUMS)
    if kind != HOST_SUMS:
        many = max(1, SUMMED_AT_ONCE_BYTES // pool.block_nbytes)
        return Summing(kind, half.digests, many, many)  # type: ignore[attr-defined]
    at_once, ahead = (max(1, n // pool.block_nbytes) for n in (SUMMED_BYTES, SUMMED_AHEAD_BYTES))
    return Summing(kind, pool.digests, at_once, ahead)


class Ahead:
    """Of one source. Thread-safe."""

    def __init__(self, halves: Mapping[str, SourceHalf], pool: Pool, host_id: str) -> None:
        """halves: best first; the first that is not `seldom` taken counts."""
        usual = [half for half in halves.values() if not getattr(half, "seldom", False)]
        self._how = summing(usual[0], pool) if usual else None
        self._where = None if self._how is None else _where(halves, self._how.kind)
        self._block_nbytes, self._host_id = pool.block_nbytes, host_id
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Tickets whose checksums nobody has computed yet; None: the end."""

    @property
    def kind(self) -> str:
        """Of the checksums that most readers will take."""
        return HOST_SUMS if self._how is None else self._how.kind

    def place(self, block_ids: Sequence[int]) -> Callable[[LeaseMark], Place] | None:
        """What a ticket for whole blocks says of where they lie, given its mark; None: nothing."""
        if self._where is None:
            return None
        blocks, (transport, path, nonce) = np.asarray(block_ids, "<u4").tobytes(), self._where
        return lambda mark: Place(
            transport=transport,
            host_id=self._host_id,
            path=path,
            nonce=nonce,
            block_nbytes=self._block_nbytes,
            blocks=blocks,
            mark=mark,
        )

    def soon(self, ticket_id: str) -> None:
        """Let the thread that is in `run` compute the ticket's checksums."""
        if self._how is not None:
            self._fresh.put(ticket_id)

    def run(self, outbox: Outbox) -> None:
        """Until `close`."""
        with contextlib.suppress(OSError):  # a matter of taste, not of correctness
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (ticket_id := self._fresh.get()) is not None:
            how = self._how
            assert how is not None, "nothing is summed ahead"
            try:
                outbox.sum_ahead(ticket_id, how.kind, how.compute, how.ahead)
            except Exception:  # a device's: whoever reads finds out, too
                log.exception("Computing the checksums of ticket %s failed.", ticket_id)

    def close(self) -> None:
        self._fresh.put(None)


def _where(halves: Mapping[str, SourceHalf], kind: str) -> tuple[str, str, bytes] | None:
    """(transport, path, nonce) of the pool for readers who need not ask: over the best transport
    whose other half can copy so, if it expects the checksums that are computed ahead."""
    for name, half in halves.items():
        where = getattr(half, "where", None)
        if where is not None:
            return (name, *where()) if getattr(half, "sums_kind", HOST_SUMS) == kind else None
    return None
