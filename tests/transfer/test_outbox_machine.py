"""Random interleavings of everything that can happen to tickets, checked against a plain model."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from pdserve.kv_transfer.held import Read, Refusal, TicketState
from pdserve.kv_transfer.outbox import Outbox
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import Fetch, Outcome, Progress

LEASE_S = 10.0
SLICES = 3
FINGERPRINT = LayoutFingerprint(
    model="m",
    weights="w",
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=1,
)


class OutboxMachine(RuleBasedStateMachine):
    """The model: when each live ticket's lease ends, and how many readers every ticket has."""

    tickets = Bundle("tickets")
    reads = Bundle("reads")

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.epoch = 1
        self.made = 0
        self.releases = 0
        self.returned: Counter[str] = Counter()
        self.readers: Counter[str] = Counter()
        self.lease: dict[str, float] = {}
        self.offered: set[str] = set()
        self.shown: dict[str, Progress] = {}
        """Growing tickets → what was shown so far."""
        self.kept: set[str] = set()
        """Cut while nobody read: never returned."""
        self.outbox = self._new_outbox()

    def _new_outbox(self) -> Outbox:
        return Outbox(
            worker_id="p",
            epoch=self.epoch,
            host="h",
            port=1,
            transports=("tcp",),
            fingerprint=FINGERPRINT,
            lease_s=LEASE_S,
            on_returned=self._on_returned,
            slices=SLICES,
            clock=lambda: self.now,
        )

    def _on_returned(self, ticket: KVTicket, ending: str) -> None:
        assert self.readers[ticket.ticket_id] == 0, "returned while being read"
        assert ticket.epoch == self.epoch
        self.returned[ticket.ticket_id] += 1

    def _stands(self, ticket: KVTicket) -> bool:
        if ticket.ticket_id in self.shown:
            return True
        return ticket.epoch == self.epoch and self.lease.get(ticket.ticket_id, -1.0) > self.now

    @rule(target=tickets, blocks=st.integers(1, 4))
    def offer(self, blocks: int) -> KVTicket:
        self.made += 1
        ticket = self.outbox.offer(f"r{self.made}", range(blocks), blocks, [b""] * blocks)
        self.lease[ticket.ticket_id] = self.now + LEASE_S
        self.offered.add(ticket.ticket_id)
        return ticket

    @rule(target=tickets, blocks=st.integers(1, 4))
    def open(self, blocks: int) -> KVTicket:
        self.made += 1
        ticket = self.outbox.open(f"r{self.made}", blocks, [b""] * blocks, sliced=True)
        self.shown[ticket.ticket_id] = Progress()
        self.offered.add(ticket.ticket_id)
        return ticket

    @rule(ticket=tickets, more=st.integers(0, 4))
    def extend(self, ticket: KVTicket, more: int) -> None:
        shown = self.shown.get(ticket.ticket_id)
        if shown is not None:
            end = min(shown.blocks + more, ticket.num_blocks)
            self.outbox.extend(ticket.request_id, range(shown.blocks, end))
            self.shows(ticket, Progress(blocks=end))

    def shows(self, ticket: KVTicket, progress: Progress) -> None:
        self.shown[ticket.ticket_id] = progress
        seen = self.outbox.watch(ticket.ticket_id, self.epoch, Progress(), 0.0)
        assert seen == (progress, False)

    @rule(ticket=tickets, ahead=st.integers(1, 4), slices=st.integers(1, SLICES - 1))
    def advance(self, ticket: KVTicket, ahead: int, slices: int) -> None:
        shown = self.shown.get(ticket.ticket_id)
        first = 0 if shown is None else shown.blocks
        end = min(first + ahead, ticket.num_blocks)
        if end == first:
            return
        self.outbox.advance(ticket.ticket_id, range(first, end), slices)
        if shown is not None and slices > shown.slices:
            self.shows(ticket, Progress(blocks=first, ahead=end - first, slices=slices))

    @rule(ticket=tickets)
    def seal(self, ticket: KVTicket) -> None:
        shown = self.shown.pop(ticket.ticket_id, None)
        if shown is not None:
            self.outbox.seal(ticket.request_id, range(shown.blocks, ticket.num_blocks))
            self.lease[ticket.ticket_id] = self.now + LEASE_S

    @rule(ticket=tickets)
    def cut(self, ticket: KVTicket) -> None:
        if self.shown.pop(ticket.ticket_id, None) is None:
            return
        unread = not self.readers[ticket.ticket_id]
        assert self.outbox.cut(ticket.request_id) is unread
        if unread:
            self.kept.add(ticket.ticket_id)
            self.offered.remove(ticket.ticket_id)

    @rule(target=reads, ticket=tickets, unit=st.integers(0, 4 * SLICES), sliced=st.booleans())
    def begin(self, ticket: KVTicket, unit: int, sliced: bool) -> object:
        slices = ticket.slices if sliced else 1
        fetch = Fetch(
            ticket_id=ticket.ticket_id,
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            fingerprint=FINGERPRINT,
            transport="tcp",
            wanted=(unit,),
            host_id="",
            slices=slices,
        )
        shown = self.shown.get(ticket.ticket_id, Progress(blocks=ticket.num_blocks))
        stood = self._stands(ticket) and shown.has(unit, slices)
        try:
            read = self.outbox.begin(fetch)
        except Refusal:
            assert not stood
            return multiple()
        assert stood
        self.readers[ticket.ticket_id] += 1
        return read

    @rule(read=consumes(reads))
    def end(self, read: Read) -> None:
        ticket = read.held.ticket
        if ticket.epoch != self.epoch:
            return  # the process that read it is gone
        assert self.returned[ticket.ticket_id] == 0
        self.readers[ticket.ticket_id] -= 1
        self.outbox.end(read)

    @rule(ticket=tickets)
    def withdraw(self, ticket: KVTicket) -> None:
        self.outbox.withdraw(ticket.request_id)
        self.lease.pop(ticket.ticket_id, None)

    @rule(ticket=tickets)
    def renew(self, ticket: KVTicket) -> None:
        stood = self._stands(ticket)
        assert self.outbox.renew(ticket.ticket_id, ticket.epoch) == stood
        if stood and ticket.ticket_id not in self.shown:
            self.lease[ticket.ticket_id] = self.now + LEASE_S

    @rule(ticket=tickets, outcome=st.sampled_from(Outcome), times=st.integers(1, 2))
    def release(self, ticket: KVTicket, outcome: Outcome, times: int) -> None:
        stood = self._stands(ticket)
        self.releases += 1
        reader = f"reader {self.releases}"
        for _ in range(times):
            valid = self.outbox.release(ticket.ticket_id, ticket.epoch, outcome, reader)
            assert valid == stood
        self.lease.pop(ticket.ticket_id, None)
        other = msgspec.structs.replace(ticket, epoch=ticket.epoch + 1)
        assert not self.outbox.release(other.ticket_id, other.epoch, outcome, reader)

    @rule(seconds=st.floats(0.0, 12.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        following = self.outbox.expire()
        standing = [end for end in self.lease.values() if end > self.now]
        assert following == min(standing, default=None)

    @rule()
    def restart(self) -> None:
        """The process dies: its blocks die with it, its tickets must never work again."""
        self.epoch += 1
        self.lease.clear()
        self.readers.clear()
        self.offered.clear()
        self.shown.clear()
        self.kept.clear()
        self.returned.clear()
        self.outbox = self._new_outbox()

    @invariant()
    def blocks_are_returned_exactly_once(self) -> None:
        if not hasattr(self, "outbox"):
            return
        assert all(count == 1 for count in self.returned.values())
        held = {
            ticket_id
            for ticket_id in self.offered
            if self.outbox.state(ticket_id) is not TicketState.RETURNED
        }
        assert held == self.offered - set(self.returned)
        for ticket_id, end in self.lease.items():
            if end > self.now:
                assert ticket_id in held
        for ticket_id, count in self.readers.items():
            if count:
                assert ticket_id in held
        assert not self.kept & set(self.returned)
        counters = self.outbox.counters()
        assert counters.growing == len(self.shown)
        assert counters.held_tickets == len(held) - len(self.shown)

    def teardown(self) -> None:
        if not hasattr(self, "outbox"):
            return
        for ticket_id, count in self.readers.items():
            held = self.outbox._held.get(ticket_id)
            for _ in range(count):
                assert held is not None
                self.readers[ticket_id] -= 1
                self.outbox.end(Read(held, (0,)))
        for ticket_id in list(self.shown):
            assert self.outbox.cut(self.outbox._held[ticket_id].ticket.request_id)
            self.offered.remove(ticket_id)
        self.outbox.close()
        assert set(self.returned) == self.offered
        assert self.outbox.counters().held_blocks == 0


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
