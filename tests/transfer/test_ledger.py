"""What readers on the source's host see without asking, and what they take because of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from transfer_rig import FINGERPRINT, HostMemory, Rig, is_poison, poison, scramble

from pdserve.kernels.digest import Sums, copy_blocks
from pdserve.kv_transfer import ledger as ledger_module
from pdserve.kv_transfer import transports
from pdserve.kv_transfer.ledger import SLOTS, Lease, Ledger, View, layout_word
from pdserve.kv_transfer.memory import HOST_SUMS, PoolError
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.ticket import KVTicket, LeaseMark
from pdserve.protocol.transfer import Fetch


def seen(mark: LeaseMark) -> Lease:
    return Lease(View(mark.path, mark.nonce), mark)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(8, FINGERPRINT)
    yield ledger
    ledger.close()


def entered(ledger: Ledger) -> LeaseMark:
    mark = ledger.enter()
    assert mark is not None
    return mark


def test_a_mark_is_seen_until_it_is_struck(ledger: Ledger) -> None:
    mark = entered(ledger)
    lease = seen(mark)
    assert lease.stands()
    ledger.strike(mark)
    assert not lease.stands()
    again = entered(ledger)
    assert again.slot == mark.slot and not lease.stands(), "another ticket has the slot now"
    assert seen(again).stands()


def test_when_all_slots_are_taken_there_is_no_mark(ledger: Ledger) -> None:
    marks = [entered(ledger) for _ in range(SLOTS)]
    assert ledger.enter() is None
    ledger.strike(marks[7])
    assert entered(ledger).slot == marks[7].slot


def test_sums_are_seen_once_all_are_known(ledger: Ledger) -> None:
    lease = seen(entered(ledger))
    assert lease.sums([1, 2]) is None
    ledger.know([1, 2], [11, 2**64 - 1])
    sums = lease.sums([2, 1])
    assert sums is not None and sums.tolist() == [2**64 - 1, 11]
    assert lease.sums([1, 2, 3]) is None and lease.sums([8]) is None
    ledger.forget([2])
    assert lease.sums([2]) is None


def test_a_ledger_says_what_the_layout_is(ledger: Ledger) -> None:
    other = msgspec.structs.replace(FINGERPRINT, weights="other")
    layout = seen(entered(ledger)).layout
    assert layout == layout_word(FINGERPRINT) != layout_word(other)


@pytest.mark.parametrize("changes", [{"slot": SLOTS}, {"slot": -1}, {"stamp": 0}])
def test_marks_that_cannot_be(ledger: Ledger, changes: dict[str, Any]) -> None:
    with pytest.raises(PoolError, match="has no LeaseMark"):
        seen(msgspec.structs.replace(entered(ledger), **changes))


def test_another_file_is_no_ledger(ledger: Ledger) -> None:
    memory = HostMemory(4, ledger_module.WORD)
    try:
        with pytest.raises(PoolError, match="more than 4 words"):
            seen(LeaseMark(path=memory.path, nonce=memory.nonce, slot=0, stamp=1))
    finally:
        memory.close()


# What a sink does with it.


class Ends:
    """A source that tells whether it was asked, and a sink."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig, self.theirs, self.ours = rig, rig.memory(), rig.memory()
        scramble(self.theirs)
        poison(self.ours)
        self.source, self.sink = rig.source(self.theirs), rig.sink(self.ours)
        self.asked: list[Fetch] = []
        send = TransferSource._send

        def recorded(source: TransferSource, line: Any, fetch: Fetch) -> None:
            self.asked.append(fetch)
            send(source, line, fetch)

        monkeypatch.setattr(TransferSource, "_send", recorded)

    def summed(self, offered: Sequence[int], **changes: Any) -> KVTicket:
        """A ticket whose checksums are known."""
        ticket = self.rig.ticket(self.source, f"r{offered[0]}", offered)
        assert ticket.place is not None
        lease, until = seen(ticket.place.mark), time.monotonic() + 10
        while lease.sums(offered) is None:
            assert time.monotonic() < until
            threading.Event().wait(0.001)
        place = msgspec.structs.replace(ticket.place, **changes)
        return msgspec.structs.replace(ticket, place=place)

    def same(self, there: Sequence[int], here: Sequence[int]) -> bool:
        pairs = zip(there, here, strict=True)
        return all(self.theirs.view(one) == self.ours.view(other) for one, other in pairs)


@pytest.fixture
def ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Ends:
    return Ends(rig, monkeypatch)


def test_blocks_are_taken_without_a_word(ends: Ends) -> None:
    ticket = ends.summed([3, 9, 4])
    report = ends.rig.fetch(ends.sink, ticket, [0, 2], [7, 8]).only()
    assert report.ok and report.transport == "shm"
    assert report.nbytes == 2 * ends.theirs.block_nbytes
    assert ends.asked == [] and ends.same([3, 4], [7, 8])
    assert ends.rig.returned.wait() == [("r3", "committed")]
    assert ends.source.counters().bytes_out == report.nbytes


@pytest.mark.parametrize("changes", [{"block_nbytes": 1500}, {"host_id": "x"}, {"blocks": b""}])
def test_whoever_cannot_be_sure_asks(ends: Ends, changes: dict[str, Any]) -> None:
    report = ends.rig.fetch(ends.sink, ends.summed([3, 9], **changes), [0, 1], [7, 8]).only()
    assert report.ok and len(ends.asked) == 1
    assert ends.same([3, 9], [7, 8])


def test_other_bytes_than_were_summed_are_not_taken(ends: Ends) -> None:
    ticket = ends.summed([3, 9])
    ends.source._ledger.know([9], np.array([1], np.uint64))
    report = ends.rig.fetch(ends.sink, ticket, [0, 1], [7, 8]).only()
    assert report.ok and [fetch.wanted for fetch in ends.asked] == [(1,)]
    assert ends.same([3, 9], [7, 8])


def test_a_ticket_that_ends_meanwhile_makes_the_copy_void(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = ends.summed([3, 9])

    def copied(*given: Any, **more: Any) -> Sums:
        sums = copy_blocks(*given, **more)
        ends.source.withdraw("r3")
        return sums

    monkeypatch.setattr(transports, "copy_blocks", copied)
    report = ends.rig.fetch(ends.sink, ticket, [0, 1], [7, 8]).only()
    assert report.failed == (0, 1) and "lease" in report.reason


def test_a_ticket_that_is_over_is_not_copied(ends: Ends) -> None:
    ticket = ends.summed([3, 9])
    ends.source.withdraw("r3")
    report = ends.rig.fetch(ends.sink, ticket, [0, 1], [7, 8]).only()
    assert report.failed == (0, 1) and "released or expired" in report.reason
    assert is_poison(ends.ours, 7)


def test_what_is_offered_again_is_summed_again(ends: Ends) -> None:
    first = ends.summed([3])
    ends.source.withdraw("r3")
    scramble(ends.theirs, seed=1)
    second = ends.summed([3])
    report = ends.rig.fetch(ends.sink, second, [0], [7]).only()
    assert report.ok and ends.asked == [] and ends.same([3], [7])
    assert ends.rig.fetch(ends.sink, first, [0], [8]).only().failed == (0,)


def test_a_source_that_was_killed_leaves_what_it_said(rig: Rig) -> None:
    """Its pool does not change any more: what was copied out of it counts, its release does not."""
    child = rig.child("shm", 8, 3000)
    sink = rig.sink(rig.memory(8, 3000))
    assert rig.fetch(sink, child.ticket("a", 2), [0, 1], [0, 1]).only().ok
    kept = child.ticket("b", 2)
    assert kept.place is not None
    lease = seen(kept.place.mark)
    child.close()  # and waits: as long as its connection lives, its blocks can be had
    assert lease.stands()
    assert rig.fetch(sink, kept, [0], [2]).only().failed == (0,), "nobody answers any more"


def test_growing_tickets_have_no_place(ends: Ends) -> None:
    ends.source.open("g", 16, [b"h"])
    assert ends.source.seal("g", [4]).place is None
    assert ends.source.outbox.sum_ahead("unknown", HOST_SUMS, list) is None
