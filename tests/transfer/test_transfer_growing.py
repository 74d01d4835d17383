"""Tickets whose prompt is still being computed: blocks travel as they become ready."""

from __future__ import annotations

import threading

import pytest
from transfer_rig import PATIENCE_S, Gate, HostMemory, Reports, Rig, is_poison, poison, scramble

from pdserve.kv_transfer.held import Refusal
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import Fetch

SIZE = 16


@pytest.fixture
def theirs(rig: Rig) -> HostMemory:
    memory = rig.memory()
    scramble(memory)
    return memory


@pytest.fixture
def ours(rig: Rig) -> HostMemory:
    memory = rig.memory()
    poison(memory)
    return memory


@pytest.fixture
def source(rig: Rig, theirs: HostMemory) -> TransferSource:
    return rig.source(theirs)


@pytest.fixture(params=["shm", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_ticket(source: TransferSource, blocks: int, request_id: str = "r") -> KVTicket:
    """Of a prompt that ends in the middle of its last block."""
    return source.open(request_id, SIZE * blocks - 3, [b"h"] * (blocks - 1))


def same(theirs: HostMemory, block: int, ours: HostMemory, target: int) -> bool:
    return bytes(theirs.view(block)) == bytes(ours.view(target))


def arrival(gate: Gate) -> None:
    """Until the sink has received a piece."""
    assert gate.reached.wait(PATIENCE_S)
    gate.reached.clear()


@pytest.fixture
def watched(source: TransferSource, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a sink asks how far a ticket is."""
    asked, watch = threading.Event(), source.outbox.watch

    def watching(ticket_id: str, epoch: int, have: int, wait_s: float) -> tuple[int, bool]:
        asked.set()
        return watch(ticket_id, epoch, have, wait_s)

    monkeypatch.setattr(source.outbox, "watch", watching)
    return asked


def test_blocks_travel_before_the_prompt_is_complete(
    rig: Rig, source: TransferSource, theirs: HostMemory, ours: HostMemory, transport: str
) -> None:
    gate = Gate(transport)
    gate.opened.set()
    sink = rig.sink(ours, transport=transport, halves=gate.halves())
    ticket = open_ticket(source, 4)
    assert ticket.growing and ticket.num_blocks == 4
    source.extend("r", [7, 3])
    reports = rig.fetch(sink, ticket, range(4), [10, 11, 12, 13])
    arrival(gate)
    source.extend("r", [5])
    arrival(gate)
    assert same(theirs, 7, ours, 10)
    assert not reports.got and not rig.returned.got
    sealed = source.seal("r", [9])
    assert (sealed.ticket_id, sealed.growing) == (ticket.ticket_id, False)
    report = reports.only()
    assert report.ok and report.nbytes == 4 * theirs.block_nbytes
    for block, target in zip([7, 3, 5, 9], [10, 11, 12, 13], strict=True):
        assert same(theirs, block, ours, target)
    assert rig.returned.wait() == [("r", "committed")]
    early = source.counters().bytes_early
    assert early in (2 * theirs.block_nbytes, 3 * theirs.block_nbytes)
    assert sink.counters().in_flight == 0


def test_nothing_wanted_waits_for_the_end(
    rig: Rig, source: TransferSource, ours: HostMemory
) -> None:
    """All blocks may be cached where they go; the ticket must still be released."""
    sink = rig.sink(ours)
    ticket = open_ticket(source, 3)
    reports = rig.fetch(sink, ticket, [], [])
    source.extend("r", [1, 2])
    source.seal("r", [3])
    assert reports.only().ok
    assert rig.returned.wait() == [("r", "committed")]


def test_a_cut_ends_the_fetch_and_nothing_counts(
    rig: Rig, source: TransferSource, ours: HostMemory, transport: str
) -> None:
    gate = Gate(transport)
    gate.opened.set()
    sink = rig.sink(ours, transport=transport, halves=gate.halves())
    reports = rig.fetch(sink, open_ticket(source, 3), [1, 2], [10, 11])
    source.extend("r", [1, 2])
    arrival(gate)
    cut = source.cut("r")
    report = reports.only()
    assert report.failed == (1, 2) and "unknown, released or expired" in report.reason
    if cut:
        assert not rig.returned.got, "the blocks stayed the caller's"
    else:  # the source's thread had not yet come back from the send
        assert rig.returned.wait() == [("r", "withdrawn")]
    again = source.offer("r", [1, 2, 4], SIZE * 3 - 3, [b"h"] * 2)
    assert rig.fetch(sink, again, [2], [12]).only().ok


def test_a_cut_while_blocks_are_sent_waits_for_the_reader(rig: Rig, source: TransferSource) -> None:
    ticket = open_ticket(source, 3)
    source.extend("r", [1, 2])
    read = source.outbox.begin(fetch_of(ticket, (0, 1)))
    assert read.early
    with pytest.raises(Refusal, match="still to be computed; 2 are ready"):
        source.outbox.begin(fetch_of(ticket, (2,)))
    assert not source.cut("r")
    assert read.stopped and not rig.returned.got
    source.outbox.end(read)
    assert rig.returned.wait() == [("r", "withdrawn")]
    assert source.counters().outbox.held_blocks == 0


def fetch_of(ticket: KVTicket, wanted: tuple[int, ...]) -> Fetch:
    return Fetch(
        ticket_id=ticket.ticket_id,
        request_id=ticket.request_id,
        epoch=ticket.epoch,
        fingerprint=ticket.fingerprint,
        transport="tcp",
        wanted=wanted,
        host_id="",
    )


def test_another_may_come_after_one_that_was_cancelled(
    rig: Rig, source: TransferSource, ours: HostMemory, watched: threading.Event
) -> None:
    sink, ticket = rig.sink(ours), open_ticket(source, 3)
    reports = rig.fetch(sink, ticket, range(3), [10, 11, 12])
    assert watched.wait(PATIENCE_S)
    sink.cancel("r")
    assert reports.only().reason == "The request was cancelled."
    assert is_poison(ours, 10)
    second = rig.sink(ours, name="decode-1")
    reports = rig.fetch(second, ticket, range(3), [10, 11, 12])
    source.extend("r", [1, 2])
    source.seal("r", [3])
    assert reports.only().ok


@pytest.mark.parametrize("who", ["source", "sink"])
def test_closing_either_side_ends_it(
    rig: Rig, source: TransferSource, ours: HostMemory, watched: threading.Event, who: str
) -> None:
    sink = rig.sink(ours)
    reports = rig.fetch(sink, open_ticket(source, 3), range(3), [10, 11, 12])
    assert watched.wait(PATIENCE_S)
    (source if who == "source" else sink).close()
    assert reports.only().failed == (0, 1, 2)
    assert source.cut("r"), "what grows stays the engine's"


def test_others_do_not_wait_behind_growing_tickets(
    rig: Rig, source: TransferSource, ours: HostMemory
) -> None:
    """More of them than the sink has threads, and a bound on their number."""
    sink = rig.sink(ours, threads=1, growing=3)
    waiting: list[Reports] = []
    for number in range(3):
        ticket = open_ticket(source, 2, f"g{number}")
        waiting.append(rig.fetch(sink, ticket, range(2), [10 + 2 * number, 11 + 2 * number]))
    refused = rig.fetch(sink, open_ticket(source, 2, "g3"), range(2), [30, 31])
    assert "3 growing tickets" in refused.only().reason
    whole = rig.fetch(sink, rig.ticket(source, "whole", [1, 2]), range(2), [20, 21])
    assert whole.only().ok
    for number in range(3):
        source.seal(f"g{number}", [3 + 2 * number, 4 + 2 * number])
    assert all(reports.only().ok for reports in waiting)
    assert source.cut("g3")


def test_without_another_thread_the_fetch_fails_and_nothing_else(
    rig: Rig, source: TransferSource, ours: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = rig.sink(ours)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    reports = rig.fetch(sink, open_ticket(source, 2), [0, 1], [4, 5])
    monkeypatch.undo()
    assert reports.only().failed == (0, 1) and "needs a thread" in reports.only().reason
    assert source.cut("r") and sink.counters().fetching == 0
