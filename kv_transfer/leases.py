"""What a sink says about tickets' leases: renewed while they are needed, released once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from pdserve.kv_transfer.job import Job
from pdserve.kv_transfer.line import Address, EpochChanged, Line, LinePool
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import Outcome, Release, Released, Renew, ToReader
from pdserve.protocol.wire import MessageDecoder

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 1.0
RENEW_TIMEOUT_S = 1.0
SILENT_S = 3.0
"""A source that did not answer is left alone for so long: leases at other sources must not end
because one thread asks it for each of its tickets."""

_TO_READER: MessageDecoder[Any] = MessageDecoder(ToReader)


@dataclass(slots=True, eq=False)
class _Kept:
    """A ticket whose request has no room yet."""

    ticket: KVTicket
    renew_at: float


class Leases:
    """Thread-safe. `keep`, `drop` and `close` only take a lock; the others talk to sources."""

    def __init__(self, lines: LinePool) -> None:
        self._lines = lines
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._release_until = float("inf")
        self._silent: dict[Address, float] = {}
        """Until when; touched by the thread that renews alone."""
        self.failed = 0
        """Releases that got no answer."""

    def keep(self, ticket: KVTicket) -> None:
        """Renew the ticket's lease, whenever `renew_kept` is called, until `drop`."""
        with self._lock:
            self._kept[ticket.request_id] = _Kept(ticket, time.monotonic() + ticket.lease_s / 3)

    def drop(self, request_id: str) -> None:
        with self._lock:
            self._kept.pop(request_id, None)

    def close(self, deadline: float) -> None:
        """Releases take no longer than this from now on. They have RELEASE_TIMEOUT_S at most."""
        with self._lock:
            farewell = min(deadline, time.monotonic() + RELEASE_TIMEOUT_S)
            self._release_until = min(self._release_until, farewell)

    def renew_kept(self) -> float:
        """Renew those whose time has come; returns when the next one's will."""
        with self._lock:
            kept = list(self._kept.values())
        for one in kept:
            if time.monotonic() >= one.renew_at and not self._renew_one(one):
                self.drop(one.ticket.request_id)  # the fetch will find out why
        return min((one.renew_at for one in kept), default=float("inf"))

    def _renew_one(self, kept: _Kept) -> bool:
        """Whether to renew it again."""
        ticket = kept.ticket
        kept.renew_at = time.monotonic() + ticket.lease_s / 3
        try:
            return self._renewed(ticket) is not False
        except EpochChanged:
            return False

    def renew(self, job: Job) -> None:
        """Renew the lease of a fetch; stop it if the lease is over."""
        job.renew_at = time.monotonic() + job.ticket.lease_s / 3
        try:
            stands = self._renewed(job.ticket)
        except EpochChanged:
            return  # the fetch itself finds out what that means
        if stands is False:
            job.stop("The lease ended before all KV blocks had arrived.", Outcome.FAILED)

    def _renewed(self, ticket: KVTicket) -> bool | None:
        """Whether the ticket's lease stands, and has begun anew; None if its source does not
        answer. Raises EpochChanged."""
        address, now = Address.of(ticket), time.monotonic()
        if now < self._silent.get(address, 0.0):
            return None
        message = Renew(ticket_id=ticket.ticket_id, epoch=ticket.epoch)
        try:
            return self._settle(ticket, message, now + RENEW_TIMEOUT_S)
        except EpochChanged:
            raise
        except (OSError, ProtocolError) as error:
            log.info("Renewing the lease of %s failed: %s", ticket.request_id, error)
            if isinstance(error, TimeoutError):
                self._silent = {one: end for one, end in self._silent.items() if end > now}
                self._silent[address] = time.monotonic() + SILENT_S
            return None

    def release(self, job: Job) -> bool:
        """Tell the source that the fetch is over; True if the lease stood until now. Asked again
        on a new connection if the first one fails, since the answer decides about a borrowed copy.
        A ticket that grows is not this side's to release: another reader may take it up.
        """
        if not job.releasable or job.growing:
            return False
        message = Release(
            ticket_id=job.ticket.ticket_id,
            epoch=job.ticket.epoch,
            outcome=job.outcome,
            nbytes=job.unasked,
        )
        deadline = min(time.monotonic() + RELEASE_TIMEOUT_S, self._release_until)
        for _ in range(2):
            try:
                return self._settle(job.ticket, message, deadline)
            except EpochChanged:
                return False
            except (OSError, ProtocolError) as error:
                log.info("Releasing %s failed: %s", job.ticket.request_id, error)
        with self._lock:
            self.failed += 1
        return False

    def _settle(self, ticket: KVTicket, message: Release | Renew, deadline: float) -> bool:
        """Send a message about a ticket's lease; whether it stands."""
        with self._lines.line(Address.of(ticket), deadline, _nobody) as line:
            line.send(message, deadline)
            answer = line.receive(_TO_READER, deadline)
            if not isinstance(answer, Released) or answer.ticket_id != ticket.ticket_id:
                raise ProtocolError("The source answered a release with another message.")
        return answer.valid


def _nobody(line: Line) -> None:
    """Short exchanges are not interrupted: they have a short deadline."""
