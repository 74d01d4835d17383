"""The outbox: who may read the blocks of finished prefills, and when they go back to the pool.

                 begin                 end
    READY ──────────────► SENDING ──────────► READY          (any number of readers at once)
      │                      │
      │ release, withdraw,   │ release, withdraw, expiry, close
      │ expiry, close        ▼
      │                   ENDING ── last reader's end ──┐    (nobody may begin any more)
      ▼                                                 ▼
    RETURNED ◄──────────────────────────────────────────┘    reported exactly once

Pure but for a lock and the callback: no sockets, no threads, and the clock is given. Blocks belong
to the outbox from `offer` until `on_returned` is called for their ticket. Readers of shared memory
do not count as readers here, since nobody can see them: they learn from `release` whether the
ticket still stood when they were done, and throw their copy away if it did not.
"""

from __future__ import annotations

import enum
import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.protocol.errors import PdserveError
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import Fetch, Outcome

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Released tickets whose verdict is kept, for a reader that must ask again on a new connection."""


class TicketState(enum.Enum):
    READY = enum.auto()
    SENDING = enum.auto()
    ENDING = enum.auto()
    RETURNED = enum.auto()


class Ending(enum.StrEnum):
    """Why a ticket's blocks went back to the pool."""

    COMMITTED = "committed"
    FAILED = "failed"
    ABORTED = "aborted"
    """These three are the fetching side's word (`Outcome`)."""
    WITHDRAWN = "withdrawn"
    """The own engine's: the request was aborted here."""
    EXPIRED = "expired"
    FENCED = "fenced"
    """The worker's epoch is over."""
    CLOSED = "closed"
    """The transfer was shut down."""


class Refusal(PdserveError):
    """A fetch that the outbox does not allow; `str()` is the sentence for the reader."""


@dataclass(frozen=True, slots=True)
class OutboxCounters:
    """A moment's view."""

    held_tickets: int
    held_blocks: int
    offered: int
    """Tickets minted since the start."""
    returned: dict[str, int]
    """Tickets by `Ending` since the start."""


@dataclass(slots=True, eq=False)
class _Held:
    ticket: KVTicket
    block_ids: tuple[int, ...]
    deadline: float
    readers: int = 0
    ending: Ending | None = None
    checksums: dict[int, int] = field(default_factory=dict)

    @property
    def state(self) -> TicketState:
        if self.ending is not None:
            return TicketState.ENDING if self.readers else TicketState.RETURNED
        return TicketState.SENDING if self.readers else TicketState.READY


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A reader's right to look at some of a ticket's blocks until it is given to `Outbox.end`."""

    held: _Held
    wanted: tuple[int, ...]

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Block numbers in the pool, in the order of `wanted`."""
        return tuple(self.held.block_ids[index] for index in self.wanted)

    @property
    def stopped(self) -> bool:
        """Whether to stop early: nobody wants the blocks any more and the pool wants them back."""
        return self.held.ending in (Ending.WITHDRAWN, Ending.FENCED, Ending.CLOSED)

    def checksums(self, compute: Callable[[int], int]) -> tuple[int, ...]:
        """Of the wanted blocks, in order; `compute(block number)` only for blocks not yet asked.
        Two readers may compute the same one at once: they get the same number."""
        known = self.held.checksums
        for index in self.wanted:
            if index not in known:
                known[index] = compute(self.held.block_ids[index])
        return tuple(known[index] for index in self.wanted)


class Outbox:
    """Thread-safe. `on_returned(ticket, ending)` is called without the lock, in the thread of
    whoever ended the ticket or, if it was being read, of its last reader."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        host: str,
        port: int,
        transports: tuple[str, ...],
        fingerprint: LayoutFingerprint,
        lease_s: float,
        on_returned: Callable[[KVTicket, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._endpoint = (host, port)
        self._transports = transports
        self._fingerprint = fingerprint
        self._lease_s = lease_s
        self._on_returned = on_returned
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._by_request: dict[str, _Held] = {}
        self._verdicts: OrderedDict[str, str] = OrderedDict()
        self._offered = 0
        self._held_blocks = 0
        self._returned: Counter[str] = Counter()
        self._closed = False

    def offer(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        block_hashes: Sequence[bytes],
    ) -> KVTicket:
        """Take blocks over and mint their ticket. Raises ValueError if the numbers contradict each
        other or the request is offered already, RuntimeError after `close`."""
        size = self._fingerprint.block_size
        if num_tokens < 1 or len(block_ids) != -(-num_tokens // size):
            raise ValueError(
                f"{num_tokens} tokens in blocks of {size} do not fill {len(block_ids)} blocks."
            )
        if len(block_hashes) != num_tokens // size:
            raise ValueError(
                f"{num_tokens} tokens fill {num_tokens // size} blocks of {size}; "
                f"{len(block_hashes)} hashes were given."
            )
        if len(set(block_ids)) != len(block_ids):
            raise ValueError("A block was offered twice in one ticket.")
        ticket = self._mint(request_id, len(block_ids), num_tokens, tuple(block_hashes))
        with self._lock:
            if self._closed:
                raise RuntimeError("The outbox is closed and takes no more blocks.")
            if request_id in self._by_request:
                raise ValueError(f"The request {request_id} has blocks in the outbox already.")
            held = _Held(ticket, tuple(block_ids), self._clock() + self._lease_s)
            self._held[ticket.ticket_id] = self._by_request[request_id] = held
            self._offered += 1
            self._held_blocks += len(held.block_ids)
        return ticket

    def _mint(
        self, request_id: str, num_blocks: int, num_tokens: int, hashes: tuple[bytes, ...]
    ) -> KVTicket:
        host, port = self._endpoint
        return KVTicket(
            ticket_id=secrets.token_hex(16),
            request_id=request_id,
            source=self._worker_id,
            epoch=self._epoch,
            host=host,
            port=port,
            transports=self._transports,
            fingerprint=self._fingerprint,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            block_hashes=hashes,
            lease_s=self._lease_s,
        )

    def withdraw(self, request_id: str) -> None:
        """End the request's ticket, if there is one."""
        with self._lock:
            held = self._by_request.get(request_id)
            returned = held is not None and self._end(held, Ending.WITHDRAWN)
        if held is not None and returned:
            self._report(held)

    def begin(self, fetch: Fetch) -> Read:
        """Let a reader in. Raises Refusal: other epoch, unknown or ended ticket, other layout,
        indices that are not ascending or not in the ticket."""
        if fetch.epoch != self._epoch:
            raise Refusal(
                f"The ticket is from epoch {fetch.epoch}; {self._worker_id} is in epoch "
                f"{self._epoch} now and its earlier blocks are gone."
            )
        if difference := self._fingerprint.difference(fetch.fingerprint):
            raise Refusal(difference)
        with self._lock:
            held, lapsed = self._standing(fetch.ticket_id)
            if held is not None:
                _check_wanted(fetch, held.ticket)
                held.readers += 1
                return Read(held, fetch.wanted)
        if lapsed is not None:
            self._report(lapsed)
        raise Refusal(f"The ticket {fetch.ticket_id} is unknown, released or expired.")

    def sum_ahead(self, ticket_id: str, compute: Callable[[int], int]) -> None:
        """Compute the ticket's checksums before anybody asks for them, until its lease ends or a
        reader comes (who then computes what is missing). For a thread with time to spare."""
        with self._lock:
            held = self._held.get(ticket_id)
        if held is None:
            return
        for index, block in enumerate(held.block_ids):
            if held.state is not TicketState.READY:
                return
            if index in held.checksums:
                continue
            digest = compute(block)
            with self._lock:
                if held.ending is None:  # else the block may have been written to meanwhile
                    held.checksums[index] = digest

    def end(self, read: Read) -> None:
        """The reader looks at the blocks no more. Call exactly once per `begin`."""
        held = read.held
        with self._lock:
            held.readers -= 1
            assert held.readers >= 0, "a read was ended twice"
            returned = held.state is TicketState.RETURNED
            if returned:
                self._forget(held)
        if returned:
            self._report(held)

    def renew(self, ticket_id: str, epoch: int) -> bool:
        """Start the lease anew. False if it does not stand any more."""
        with self._lock:
            held, lapsed = self._standing(ticket_id) if epoch == self._epoch else (None, None)
            if held is not None:
                held.deadline = self._clock() + self._lease_s
        if lapsed is not None:
            self._report(lapsed)
        return held is not None

    def release(self, ticket_id: str, epoch: int, outcome: Outcome, reader: str) -> bool:
        """The reader is done. True if the lease stood until now; the same reader may ask again
        and gets the same answer, any other one gets False."""
        with self._lock:
            if epoch != self._epoch:
                return False
            held, lapsed = self._standing(ticket_id)
            if held is None:
                valid = self._verdicts.get(ticket_id) == reader
            else:
                valid = True
                self._verdicts[ticket_id] = reader
                if len(self._verdicts) > REMEMBERED:
                    self._verdicts.popitem(last=False)
                if self._end(held, Ending(outcome.value)):
                    lapsed = held
        if lapsed is not None:
            self._report(lapsed)
        return valid

    def expire(self) -> float | None:
        """End every lease that is over. Returns when the next one will be (on the clock given),
        None if nothing is held under a lease."""
        now = self._clock()
        with self._lock:
            due = [held for held in self._held.values() if held.ending is None]
            over = [held for held in due if held.deadline <= now]
            returned = [held for held in over if self._end(held, Ending.EXPIRED)]
            following = min((held.deadline for held in due if held.ending is None), default=None)
        for held in over:
            log.warning(
                "Nobody fetched the blocks of request %s within the lease of %.1f s.",
                held.ticket.request_id,
                self._lease_s,
            )
        for held in returned:
            self._report(held)
        return following

    def begin_epoch(self, epoch: int) -> None:
        """End every ticket; those minted from now on are of `epoch`."""
        with self._lock:
            self._epoch = epoch
            returned = self._end_all(Ending.FENCED)
        for held in returned:
            self._report(held)

    def close(self) -> None:
        """End every ticket and take no more offers. Idempotent."""
        with self._lock:
            self._closed = True
            returned = self._end_all(Ending.CLOSED)
        for held in returned:
            self._report(held)

    def state(self, ticket_id: str) -> TicketState:
        with self._lock:
            held = self._held.get(ticket_id)
            return TicketState.RETURNED if held is None else held.state

    def counters(self) -> OutboxCounters:
        with self._lock:
            return OutboxCounters(
                held_tickets=len(self._held),
                held_blocks=self._held_blocks,
                offered=self._offered,
                returned=dict(self._returned),
            )

    # Below: called with the lock held, except _report.

    def _standing(self, ticket_id: str) -> tuple[_Held | None, _Held | None]:
        """(the entry whose lease stands or None, the entry that this look returned or None).
        A lease is over when its time has come, not when somebody gets round to it."""
        held = self._held.get(ticket_id)
        if held is None or held.ending is not None:
            return None, None
        if held.deadline > self._clock():
            return held, None
        return None, held if self._end(held, Ending.EXPIRED) else None

    def _end_all(self, ending: Ending) -> list[_Held]:
        """Mark every entry; those that are to be reported now."""
        live = [held for held in self._held.values() if held.ending is None]
        return [held for held in live if self._end(held, ending)]

    def _end(self, held: _Held, ending: Ending) -> bool:
        """Mark an entry; True if nobody reads it, so that it is to be reported now. The first
        ending counts; once marked it is never reported from here again."""
        if held.ending is not None:
            return False
        held.ending = ending
        self._by_request.pop(held.ticket.request_id)
        if held.readers:
            return False
        self._forget(held)
        return True

    def _forget(self, held: _Held) -> None:
        assert held.ending is not None
        del self._held[held.ticket.ticket_id]
        self._held_blocks -= len(held.block_ids)
        self._returned[held.ending.value] += 1

    def _report(self, held: _Held) -> None:
        assert held.ending is not None
        try:
            self._on_returned(held.ticket, held.ending.value)
        except Exception:
            log.exception("Giving back the blocks of %s failed.", held.ticket.request_id)


def _check_wanted(fetch: Fetch, ticket: KVTicket) -> None:
    if fetch.request_id != ticket.request_id:
        raise Refusal(f"The ticket {ticket.ticket_id} belongs to another request.")
    previous = -1
    for index in fetch.wanted:
        if index <= previous or index >= ticket.num_blocks:
            raise Refusal(
                f"The wanted blocks must be ascending and below {ticket.num_blocks}. "
                f"Given: {index} after {previous}."
            )
        previous = index
    if not fetch.wanted:
        raise Refusal("A fetch must want at least one block.")
