"""One fetch on the sink's side: what is still missing, when it must end, how to end it sooner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pdserve.kv_transfer.ledger import Lease
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.missing import Missing, Units, units_of
from pdserve.kv_transfer.transports import Unpacking
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import FetchReport, Outcome, Progress

Done = Callable[[FetchReport], None]


class Ended(Exception):
    """The fetch is over, whatever is still missing; `str()` is the reason."""


@dataclass(slots=True, eq=False)
class Job:
    """One fetch. `missing` and the results belong to the thread that took the job."""

    ticket: KVTicket
    missing: Missing
    """Wanted slices that have not arrived intact yet, and where they go in a pool of slices."""
    wanted: tuple[int, ...]
    deadline: float
    done: Done
    renew_at: float
    ready: Progress
    """What of the ticket, as the source cuts it, is known to be there."""
    growing: bool
    """The source is still computing further ones."""
    block_size: int
    """Tokens per block here: `wanted` counts such blocks, `missing` slices of them."""
    slices: int = 1
    """Per block; `missing` counts slices."""
    unpacking: Unpacking | None = None
    """How to take parcels, if whole blocks will not do."""
    late: str = "The request's deadline passed before all its KV blocks had arrived."
    """What to say when `deadline` has passed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    line: Line | None = None
    """The line in use, for `stop`."""
    taken: bool = False
    """By a worker thread, or by whoever reported it instead."""
    stopped: str = ""
    """Why it shall end, once it shall."""
    outcome: Outcome = Outcome.FAILED
    """What the source shall hear."""
    releasable: bool = True
    """False once the source is known to have restarted."""
    reason: str = ""
    transport: str = ""
    nbytes: int = 0
    unasked: int = 0
    """Bytes of them that were copied without a `Fetch`."""
    arrived: int = 0
    """Slices or parcels that they were."""
    took_s: float = 0.0
    asking_s: float = 0.0
    """As in FetchReport."""
    moving_s: float = 0.0
    """Seconds in which the bytes came, waits for the source's answers aside."""
    borrowed: bool = False
    """Some blocks were copied from memory that the source could have taken back."""
    lease: Lease | None = None
    """The ticket's, as it can be seen if the source is on this host."""

    @property
    def due(self) -> Units:
        """Missing slices that can be asked for now."""
        ticket, ready, units = self.ticket, self.ready, self.missing.units
        if ready.blocks == ticket.num_blocks:
            return units
        if self.slices > 1 or self.block_size == ticket.fingerprint.block_size:
            return units_of([unit for unit in units.tolist() if ready.has(unit, self.slices)])
        tokens = ready.blocks * ticket.fingerprint.block_size
        return units[(units + 1) * self.block_size <= tokens]

    @property
    def failed(self) -> list[int]:
        """Blocks that have not arrived, ascending."""
        failed: list[int] = np.unique(self.missing.units // self.slices).tolist()
        return failed

    @property
    def num_blocks(self) -> int:
        """Of the ticket, as it is cut here."""
        return -(-self.ticket.num_tokens // self.block_size)

    def take(self) -> bool:
        """Become the one who works on it (or ends it unworked)."""
        with self.lock:
            taken, self.taken = self.taken, True
        return not taken

    def start(self, limit_s: float) -> None:
        """The transfer begins now and may take `limit_s` seconds."""
        limit = time.monotonic() + limit_s
        if limit < self.deadline:
            self.deadline, self.late = limit, f"The transfer took longer than {limit_s:g} s."

    def attach(self, line: Line | None) -> None:
        with self.lock:
            self.line = line
            if line is not None and self.stopped:
                line.interrupt()

    def stop(self, reason: str, outcome: Outcome) -> None:
        """Make it end soon. From any thread."""
        with self.lock:
            if not self.stopped:
                self.stopped, self.outcome = reason, outcome
            if self.line is not None:
                self.line.interrupt()

    def wait(self, stall_s: float) -> float:
        """The deadline of the next wait. Raises Ended if there must be none."""
        if self.stopped:
            raise Ended(self.stopped)
        now = time.monotonic()
        if now >= self.deadline:
            raise Ended(self.late)
        return min(self.deadline, now + stall_s)
