"""One attempt: everything that a fetch misses and can have is asked for over one transport.

The thread asks for the blocks in pieces, the next piece before it has received the last, and
verifies each block before it counts as arrived.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.credits import Credits
from pdserve.kv_transfer.job import Ended, Job
from pdserve.kv_transfer.ledger import Ledgers, layout_word
from pdserve.kv_transfer.line import Address, Line, LinePool
from pdserve.kv_transfer.memory import host_id
from pdserve.kv_transfer.missing import Units
from pdserve.kv_transfer.slices import Cuts
from pdserve.kv_transfer.transports import (
    PIECES,
    Arriving,
    Receiver,
    SinkHalf,
    TransportUnfit,
)
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.ticket import LayoutFingerprint
from pdserve.protocol.transfer import Fetch, FetchHeader, Refused, ToReader
from pdserve.protocol.wire import MessageDecoder

log = logging.getLogger(__name__)

NUMBER_BYTES = 4
"""Of a block's number in a ticket's place."""
ASKED_AHEAD = 2
"""Pieces of one fetch that may be on their way."""

_TO_READER: MessageDecoder[Any] = MessageDecoder(ToReader)


class Attempts:
    """Makes attempts; shared by the sink's threads."""

    def __init__(
        self,
        cuts: Cuts[SinkHalf],
        fingerprint: LayoutFingerprint,
        *,
        lines: LinePool,
        credits: Credits,
        stall_s: float,
    ) -> None:
        self._cuts, self._fingerprint = cuts, fingerprint
        self._layout = layout_word(fingerprint)
        self._lines, self._credits, self._ledgers = lines, credits, Ledgers()
        self._stall_s = stall_s
        self._host_id = host_id()

    def nbytes(self, job: Job) -> int:
        """Of one block, slice or parcel that travels."""
        if job.unpacking is not None:
            return job.unpacking.nbytes
        return self._cuts.of(1).pool.block_nbytes // job.slices

    def suits(self, name: str, job: Job) -> bool:
        """Whether the transport can bring what the job wants from where it is."""
        half = self._cuts.of(job.slices).halves.get(name)
        if half is None or (job.unpacking is not None and not hasattr(half, "unpacking")):
            return False
        reaches = getattr(half, "reaches", None)
        return reaches is None or bool(reaches(job.ticket.source))

    def make(self, job: Job, name: str) -> None:
        """Ask for everything due over one transport. Blocks whose checksum differs stay in
        `job.missing` without an exception. Raises TransportUnfit, Ended, OSError, ProtocolError."""
        begun = time.monotonic()
        try:
            self._make(job, name)
        finally:
            job.took_s += time.monotonic() - begun

    def _make(self, job: Job, name: str) -> None:
        half: Receiver = self._cuts.of(job.slices).halves[name]
        job.transport = name
        size = self.nbytes(job)
        if job.unpacking is not None:
            half = half.unpacking(job.unpacking)  # type: ignore[attr-defined]
        with (
            self._line(job, job.wait(self._stall_s)) as line,
            self._credits.account(job.ticket.source) as account,
        ):
            self._unasked(line, job, half, name)
            waiting = deque(_pieces(job.due, size, *getattr(half, "pieces", PIECES)))
            asked: deque[Units] = deque()
            while waiting or asked:
                ahead = len(asked) < ASKED_AHEAD and bool(waiting)
                if ahead and account.take(len(waiting[0]) * size, lambda: job.wait(self._stall_s)):
                    asked.append(waiting.popleft())
                    begun = time.monotonic()
                    self._ask(line, job, name, asked[-1])
                    job.asking_s += time.monotonic() - begun
                    continue
                self._receive(line, job, half, asked[0])
                account.give(len(asked.popleft()) * size)

    def _ask(self, line: Line, job: Job, name: str, piece: Units) -> None:
        ticket = job.ticket
        detail = getattr(self._cuts.of(1).halves[name], "detail", None)
        fetch = Fetch(
            ticket_id=ticket.ticket_id,
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            fingerprint=self._fingerprint,
            transport=name,
            wanted=tuple(piece.tolist()),
            host_id=self._host_id,
            detail=detail(ticket.source, ticket.epoch) if detail else "",
            parcels=None if job.unpacking is None else job.unpacking.theirs.parcels,
            slices=job.slices,
        )
        line.send(fetch, job.wait(self._stall_s))

    def _unasked(self, line: Line, job: Job, half: Receiver, name: str) -> None:
        """Copy out of the ticket's place, with checksums that the source has put into its ledger:
        without a word to it. What cannot be had so stays missing. The copy counts as a borrowed
        one does. Raises as `make` does."""
        place, copied = job.ticket.place, getattr(half, "copied", None)
        if place is None or copied is None:
            return
        if (place.transport, place.host_id) != (name, self._host_id):
            return
        alike = job.slices == 1 and job.unpacking is None
        if not alike or not job.missing or place.block_nbytes != self.nbytes(job):
            return
        lease = self._ledgers.lease(line, place.mark)
        if lease is None or lease.layout != self._layout or not lease.stands():
            return
        if len(place.blocks) != job.ticket.num_blocks * NUMBER_BYTES:
            return
        wanted, targets = job.missing.units, job.missing.targets
        blocks = np.frombuffer(place.blocks, "<u4")
        if len(wanted) < len(blocks):
            blocks = blocks[wanted]
        expected = lease.sums(blocks)
        if expected is None:
            return
        job.borrowed, job.lease, before = True, lease, job.nbytes
        arriving = copied(line, place, blocks, targets, lambda: job.wait(self._stall_s))
        self._verify(job, wanted, expected, arriving, place.block_nbytes)
        job.unasked += job.nbytes - before

    def _receive(self, line: Line, job: Job, half: Receiver, piece: Units) -> None:
        header = line.receive(_TO_READER, job.wait(self._stall_s))
        expected = self._expected(header, job, len(piece))
        if half.borrows:
            job.borrowed, job.lease = True, self._ledgers.lease(line, header.mark)
        targets = job.missing.targets_of(piece).tolist()
        arriving = half.receive(line, header, targets, lambda: job.wait(self._stall_s))
        self._verify(job, piece, expected, arriving, header.block_nbytes)

    def _verify(
        self,
        job: Job,
        piece: Units,
        expected: Sums,
        arriving: Arriving,
        nbytes: int,
    ) -> None:
        """Take blocks that arrive with the expected checksums off the job's list."""
        verified, intact, begun = 0, np.zeros(len(piece), bool), time.monotonic()
        try:
            with contextlib.closing(arriving):
                for sums in arriving:
                    complete = verified + len(sums)
                    if complete > len(piece):
                        raise ProtocolError(f"More than {len(piece)} blocks arrived.")
                    intact[verified:complete] = sums == expected[verified:complete]
                    job.nbytes += len(sums) * nbytes
                    verified = complete
        finally:
            good = int(np.count_nonzero(intact))
            job.missing.arrived(piece if good == len(piece) else piece[intact])
            if good < verified:
                _name_wrong(job, piece[:verified][~intact[:verified]])
            job.arrived += verified
            job.moving_s += time.monotonic() - begun

    def _expected(self, header: Any, job: Job, count: int) -> Sums:
        """The checksums that a header announces. Raises what a wrong or refusing answer means."""
        ticket, nbytes = job.ticket, self.nbytes(job)
        if isinstance(header, Refused):
            reason = header.reason or "The source refused and did not say why."
            if header.retry_other_transport:
                raise TransportUnfit(reason)
            raise Ended(reason)
        if not isinstance(header, FetchHeader):
            raise ProtocolError("The source answered a fetch with another message.")
        if (header.ticket_id, header.epoch) != (ticket.ticket_id, ticket.epoch):
            raise ProtocolError("The source answered for another ticket.")
        if header.num_blocks != count or len(header.checksums) != count:
            raise ProtocolError(f"The source announced {header.num_blocks} blocks, not {count}.")
        if header.block_nbytes != nbytes:
            raise ProtocolError(
                f"The source's blocks have {header.block_nbytes} bytes, the own ones {nbytes}."
            )
        try:
            return np.array(header.checksums, np.uint64)
        except OverflowError:
            raise ProtocolError("The source announced a checksum that is none.") from None

    @contextlib.contextmanager
    def _line(self, job: Job, deadline: float) -> Iterator[Line]:
        """A line that `cancel` can interrupt. Detached before it goes back to the pool."""
        with self._lines.line(Address.of(job.ticket), deadline, job.attach) as line:
            try:
                yield line
            finally:
                job.attach(None)


def _name_wrong(job: Job, units: Units) -> None:
    for unit in units.tolist():
        job.reason = f"The checksum of block {unit // job.slices} differs."
        log.warning("%s (%s)", job.reason, job.ticket.request_id)


def _pieces(units: Units, block_nbytes: int, first: int, largest: int) -> list[Units]:
    """`units` cut into growing pieces of `first` to `largest` bytes."""
    pieces, start, nbytes = [], 0, first
    while start < len(units):
        length = max(1, nbytes // block_nbytes)
        pieces.append(units[start : start + length])
        start += length
        nbytes = min(4 * nbytes, largest)
    return pieces
