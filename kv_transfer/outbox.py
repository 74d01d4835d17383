"""The outbox: who may read the blocks of prefills, and when they go back to the pool.

    open ─► GROWING ── extend, advance: more blocks, or more slices of the next ones, can be
               │ │     read; no lease, only the engine ends it
               │ │
          seal │ └── cut ─► read by nobody: over, the engine keeps the blocks; else ENDING
               ▼
             begin                 end
    READY ──────────────► SENDING ──────────► READY          (any number of readers at once)
      │                      │
      │ release, withdraw,   │ release, withdraw, expiry, close
      │ expiry, close        ▼
      │                   ENDING ── last reader's end ──┐    (nobody may begin any more)
      ▼                                                 ▼
    RETURNED ◄──────────────────────────────────────────┘    reported exactly once

Pure but for a lock and the callback: no sockets, no threads, and the clock is given. Blocks belong
to the outbox from `offer` or `seal` (or a `cut` that is not at once over) until `on_returned` is
called for their ticket; while it grows they are the request's. Readers of shared memory do not
count as readers here, since nobody can see them: they learn from its mark in the ledger, or from
`release`, whether the ticket still stood when they were done, and throw their copy away if it did
not.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.held import (
    Ending,
    Held,
    Read,
    Refusal,
    TicketState,
    check_blocks,
    check_wanted,
)
from pdserve.kv_transfer.ledger import Ledger
from pdserve.protocol.ticket import RESHAPED, KVTicket, LayoutFingerprint, LeaseMark, Place
from pdserve.protocol.transfer import Fetch, Outcome, Progress

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Released tickets whose verdict is kept, for a reader that must ask again on a new connection."""


@dataclass(frozen=True, slots=True)
class OutboxCounters:
    """A moment's view."""

    growing: int
    """Tickets whose prompt is still being computed; their blocks are not among the held ones."""
    held_tickets: int
    held_blocks: int
    offered: int
    """Tickets minted since the start."""
    returned: dict[str, int]
    """Tickets by `Ending` since the start."""


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
        slices: int = 1,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
    ) -> None:
        """ledger: where readers on this host see which tickets stand; None: they ask."""
        self._worker_id = worker_id
        self._epoch = epoch
        self._endpoint = (host, port)
        self._transports = transports
        self._fingerprint = fingerprint
        self._lease_s = lease_s
        self._slices = slices
        self._on_returned = on_returned
        self._clock = clock
        self._ledger = ledger
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._held: dict[str, Held] = {}
        self._by_request: dict[str, Held] = {}
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
        place: Callable[[LeaseMark], Place] | None = None,
    ) -> KVTicket:
        """Take blocks over and mint their ticket. Raises ValueError if the numbers contradict each
        other or the request is offered already, RuntimeError after `close`. place: what the ticket
        says of where they lie, for a ticket with a mark."""
        ticket = self._mint(request_id, num_tokens, block_hashes, growing=False)
        check_blocks(ticket, block_ids, whole=True)
        held = Held(ticket, tuple(block_ids), self._clock() + self._lease_s)
        with self._lock:
            self._add(held, place)
            self._held_blocks += len(held.block_ids)
        return held.ticket

    def open(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        *,
        sliced: bool = False,
    ) -> KVTicket:
        """Mint the ticket of a prompt that is still being computed; `sliced`: its blocks will
        `advance`. Raises as `offer` does."""
        slices = self._slices if sliced else 1
        ticket = self._mint(request_id, num_tokens, block_hashes, growing=True, slices=slices)
        with self._lock:
            self._add(Held(ticket, (), float("inf"), growing=True))
        return ticket

    def extend(self, request_id: str, block_ids: Sequence[int]) -> str:
        """The next blocks of a growing ticket are ready and will not be written to again. Returns
        its ticket id. Raises ValueError if they cannot belong to it or it does not grow."""
        with self._lock:
            held = self._growing(request_id)
            self._append(held, block_ids, whole=False)
            self._grown.notify_all()
            return held.ticket.ticket_id

    def advance(self, ticket_id: str, block_ids: Sequence[int], slices: int) -> None:
        """Of a growing ticket's next blocks, which are being computed, the first `slices` slices
        are ready and will not be written to again. From any thread, and also too late: what is not
        news, or not of a ticket that grows, is ignored. Raises ValueError for blocks that cannot be
        its next ones, and for more slices than a block has."""
        with self._lock:
            held = self._held.get(ticket_id)
            if held is None or not held.growing or set(block_ids) <= set(held.block_ids):
                return
            if not 0 < slices < held.ticket.slices:
                raise ValueError(f"Given: {slices} slices of {held.ticket.slices} to a block.")
            check_blocks(held.ticket, (*held.block_ids, *block_ids), whole=False)
            if slices > held.slices:
                held.ahead, held.slices = tuple(block_ids), slices
                self._grown.notify_all()

    def seal(self, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        """A growing ticket is complete, with these last blocks: from now on all of them belong to
        the outbox, and the lease runs. Raises ValueError as `extend` does."""
        with self._lock:
            held = self._growing(request_id)
            self._append(held, block_ids, whole=True)
            held.ticket = msgspec.structs.replace(held.ticket, growing=False)
            held.deadline = self._clock() + self._lease_s
            self._let_go(held)
            returned = self._settle(held)
        if returned:
            self._report(held)
        return held.ticket

    def cut(self, request_id: str) -> bool:
        """End a growing ticket. True: nobody reads its blocks, they are the caller's alone and
        nothing will be reported. False: the outbox has them until it reports them returned.
        Raises ValueError if it does not grow."""
        with self._lock:
            held = self._growing(request_id)
            self._over(held, Ending.WITHDRAWN)
            self._let_go(held)
            return self._settle(held)

    def watch(
        self, ticket_id: str, epoch: int, have: Progress, wait_s: float
    ) -> tuple[Progress, bool]:
        """Wait at most `wait_s` seconds until more than `have` of a ticket is ready, or all is.
        Returns (how much is, whether this is all). Raises Refusal once it is over."""
        until = time.monotonic() + wait_s
        with self._lock:
            while epoch == self._epoch and (held := self._held.get(ticket_id)) is not None:
                if held.ending is not None or held.deadline <= self._clock():
                    break
                left = until - time.monotonic()
                if held.progress.beyond(have) or not held.growing or left <= 0:
                    return held.progress, not held.growing
                self._grown.wait(left)
        raise Refusal(f"The ticket {ticket_id} is unknown, released or expired.")

    def _mint(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        growing: bool,
        slices: int = 1,
    ) -> KVTicket:
        host, port = self._endpoint
        size = self._fingerprint.block_size
        if num_tokens < 1:
            raise ValueError(f"A ticket covers at least one token. Given: {num_tokens}.")
        if len(block_hashes) != num_tokens // size:
            raise ValueError(
                f"{num_tokens} tokens fill {num_tokens // size} blocks of {size}; "
                f"{len(block_hashes)} hashes were given."
            )
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
            num_blocks=-(-num_tokens // size),
            block_hashes=tuple(block_hashes),
            lease_s=self._lease_s,
            growing=growing,
            slices=slices,
        )

    def withdraw(self, request_id: str) -> None:
        """End the request's ticket, if there is one and it does not grow (see `cut`)."""
        with self._lock:
            held = self._by_request.get(request_id)
            if held is not None and held.growing:
                return
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
        apart_from = RESHAPED if fetch.parcels else ()
        if difference := self._fingerprint.difference(fetch.fingerprint, apart_from):
            raise Refusal(difference)
        with self._lock:
            held, lapsed = self._standing(fetch.ticket_id)
            if held is not None:
                check_wanted(fetch, held)
                held.readers += 1
                return _reading(held, fetch)
        if lapsed is not None:
            self._report(lapsed)
        raise Refusal(f"The ticket {fetch.ticket_id} is unknown, released or expired.")

    def sum_ahead(
        self,
        ticket_id: str,
        kind: str,
        compute: Callable[[Sequence[int]], Sums],
        at_once: int = 1,
    ) -> None:
        """Compute the ticket's checksums, of so many blocks at once, before anybody asks for them,
        until its lease ends or a reader comes (who then computes what is missing). For a thread
        with time to spare."""
        with self._lock:
            held = self._held.get(ticket_id)
        if held is None or held.ticket.slices > 1:  # slices' checksums are wanted, not blocks'
            return
        known = held.checksums.setdefault(kind, {})
        fresh = [(i, block) for i, block in enumerate(held.block_ids) if i not in known]
        for start in range(0, len(fresh), at_once):
            if held.ending is not None or held.readers:
                return
            some = fresh[start : start + at_once]
            sums = compute([block for _, block in some])
            with self._lock:
                if held.ending is None:  # else the blocks may have been written to meanwhile
                    known.update(zip((index for index, _ in some), sums.tolist(), strict=True))
                    if self._ledger is not None and kind == self._ledger.kind:
                        self._ledger.know([block for _, block in some], sums)

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
        """Start the lease anew; a growing ticket has none. False if it does not stand any more."""
        with self._lock:
            held, lapsed = self._standing(ticket_id) if epoch == self._epoch else (None, None)
            if held is not None and not held.growing:
                held.deadline = self._clock() + self._lease_s
        if lapsed is not None:
            self._report(lapsed)
        return held is not None

    def release(self, ticket_id: str, epoch: int, outcome: Outcome, reader: str) -> bool:
        """The reader is done. True if the lease stood until now; the same reader may ask again
        and gets the same answer, any other one gets False. A growing ticket stands whoever turns
        away from it: another reader may come."""
        with self._lock:
            if epoch != self._epoch:
                return False
            held, lapsed = self._standing(ticket_id)
            if held is not None and held.growing:
                valid = True
            elif held is None:
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
            due = [held for held in self._held.values() if held.ending is None and not held.growing]
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
        """End every ticket and take no more offers; what grows stays the engine's, which lets go
        of it as ever. Idempotent."""
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
            growing = sum(held.growing for held in self._held.values())
            return OutboxCounters(
                growing=growing,
                held_tickets=len(self._held) - growing,
                held_blocks=self._held_blocks,
                offered=self._offered,
                returned=dict(self._returned),
            )

    # Below: called with the lock held, except _report.

    def _standing(self, ticket_id: str) -> tuple[Held | None, Held | None]:
        """(the entry whose lease stands or None, the entry that this look returned or None).
        A lease is over when its time has come, not when somebody gets round to it."""
        held = self._held.get(ticket_id)
        if held is None or held.ending is not None:
            return None, None
        if held.deadline > self._clock():
            return held, None
        return None, held if self._end(held, Ending.EXPIRED) else None

    def _end_all(self, ending: Ending) -> list[Held]:
        """Mark every entry; those that are to be reported now."""
        live = [held for held in self._held.values() if held.ending is None]
        self._grown.notify_all()
        return [held for held in live if self._end(held, ending)]

    def _end(self, held: Held, ending: Ending) -> bool:
        """Mark an entry; True if nobody reads it, so that it is to be reported now. The first
        ending counts; once marked it is never reported from here again."""
        if not self._over(held, ending):
            return False
        if held.growing:
            return False
        self._by_request.pop(held.ticket.request_id)
        return self._settle(held)

    def _over(self, held: Held, ending: Ending) -> bool:
        """The first ending counts: whether this is it. From here on nobody may think that a copy
        made now is the ticket's."""
        if held.ending is not None:
            return False
        held.ending = ending
        if held.mark is not None and self._ledger is not None:
            self._ledger.strike(held.mark)
        return True

    def _settle(self, held: Held) -> bool:
        """Forget an entry if it is over and unread; whether it was."""
        if held.state is not TicketState.RETURNED:
            return False
        self._forget(held)
        return True

    def _add(self, held: Held, place: Callable[[LeaseMark], Place] | None = None) -> None:
        request_id = held.ticket.request_id
        if self._closed:
            raise RuntimeError("The outbox is closed and takes no more blocks.")
        if request_id in self._by_request:
            raise ValueError(f"The request {request_id} has blocks in the outbox already.")
        self._held[held.ticket.ticket_id] = self._by_request[request_id] = held
        self._offered += 1
        if self._ledger is not None:
            self._ledger.forget(held.block_ids)
            held.mark = self._ledger.enter()
        if held.mark is not None and place is not None:
            held.ticket = msgspec.structs.replace(held.ticket, place=place(held.mark))

    def _growing(self, request_id: str) -> Held:
        held = self._by_request.get(request_id)
        if held is None or not held.growing:
            raise ValueError(f"The request {request_id} has no ticket that grows.")
        return held

    def _append(self, held: Held, block_ids: Sequence[int], whole: bool) -> None:
        blocks = (*held.block_ids, *block_ids)
        check_blocks(held.ticket, blocks, whole=whole)
        held.block_ids, held.ahead, held.slices = blocks, (), 0

    def _let_go(self, held: Held) -> None:
        """The engine computes no more for it; its blocks count as the outbox's."""
        held.growing = False
        self._held_blocks += len(held.block_ids)
        if held.ending is not None:
            self._by_request.pop(held.ticket.request_id)
        self._grown.notify_all()

    def _forget(self, held: Held) -> None:
        assert held.ending is not None
        del self._held[held.ticket.ticket_id]
        self._held_blocks -= len(held.block_ids)
        self._returned[held.ending.value] += 1

    def _report(self, held: Held) -> None:
        assert held.ending is not None
        try:
            self._on_returned(held.ticket, held.ending.value)
        except Exception:
            log.exception("Giving back the blocks of %s failed.", held.ticket.request_id)


def _reading(held: Held, fetch: Fetch) -> Read:
    """The right to read what `fetch`, which has been checked, asks for."""
    blocks, slices = (*held.block_ids, *held.ahead), fetch.slices
    ids: tuple[int, ...] = ()
    if slices > 1:
        ids = tuple(blocks[unit // slices] * slices + unit % slices for unit in fetch.wanted)
    elif fetch.parcels is None:
        ids = tuple(map(blocks.__getitem__, fetch.wanted))
    return Read(held, fetch.wanted, ids, slices > 1, held.growing)
