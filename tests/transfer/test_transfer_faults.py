"""What goes wrong in the world: corruption, death, silence, restarts, cancellation, shutdown."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from transfer_rig import (
    PATIENCE_S,
    Flipping,
    Gate,
    Reports,
    Rig,
    is_poison,
    poison,
    pools_held,
    scramble,
)

from pdserve.kv_transfer import attempt as attempt_module
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink
from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.transports import COPIED_BYTES, SINK_HALVES, Arriving, SinkHalf

BIG = 8 * 2**20
"""More than the sockets' buffers hold, so that a sender must wait for a reader."""


@pytest.fixture(params=list(SINK_HALVES))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gate(transport: str) -> Iterator[Gate]:
    gate = Gate(transport)
    yield gate
    gate.opened.set()


def until(condition: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# Corruption.


def test_a_corrupt_block_is_fetched_again(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    flipping = Flipping(transport, target=12, times=1)
    sink = rig.sink(ours, halves={transport: flipping})
    source = rig.source(theirs)
    report = rig.fetch(sink, rig.ticket(source, "r", [1, 2, 3]), range(3), [11, 12, 13]).only()
    assert report.ok and flipping.times == 0
    assert report.nbytes == 4 * theirs.block_nbytes
    assert ours.view(12) == theirs.view(2)
    assert rig.returned.wait() == [("r", "committed")]


def test_a_block_that_stays_corrupt_is_named(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    sink = rig.sink(ours, halves={transport: Flipping(transport, target=12, times=99)})
    source = rig.source(theirs)
    report = rig.fetch(sink, rig.ticket(source, "r", [1, 2, 3]), range(3), [11, 12, 13]).only()
    assert report.failed == (1,)
    assert "checksum of block 1" in report.reason
    assert ours.view(13) == theirs.view(3)
    assert rig.returned.wait() == [("r", "failed")]


def test_the_next_transport_repairs_what_the_first_one_broke(rig: Rig) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    halves = {"shm": Flipping("shm", target=12, times=99), "tcp": SINK_HALVES["tcp"]}
    sink, source = rig.sink(ours, halves=halves), rig.source(theirs)
    report = rig.fetch(sink, rig.ticket(source, "r", [1, 2, 3]), range(3), [11, 12, 13]).only()
    assert report.ok and report.transport == "tcp"
    rig.returned.wait()
    assert source.counters().bytes_out == 4 * theirs.block_nbytes
    assert all(ours.view(10 + index) == theirs.view(index) for index in (1, 2, 3))


def test_a_transport_that_changes_whatever_it_brings_is_left_alone(rig: Rig) -> None:
    theirs, ours = rig.memory(), rig.memory()
    dice = Dice(Faults(reorder=1.0))
    halves = {"shm": faulty_sink(SINK_HALVES, dice)["shm"], "tcp": SINK_HALVES["tcp"]}
    sink, source = rig.sink(ours, halves=halves), rig.source(theirs)
    scramble(theirs)
    for number in range(3):
        ticket = rig.ticket(source, f"r{number}", [1, 2])
        report = rig.fetch(sink, ticket, [0, 1], [12, 13]).only()
        assert report.ok and report.transport == "tcp"
    assert dice.count["reorder"] == 1, "asked once"


def test_one_block_that_is_wrong_condemns_no_transport(rig: Rig, transport: str) -> None:
    ours = rig.memory()
    sink = rig.sink(ours, transport="auto", halves={transport: Flipping(transport, 12, times=1)})
    source = rig.source()
    assert rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [12]).only().ok
    assert not sink._routes._unfit


# Transports that do not work here.


def test_another_host_falls_back_to_tcp(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "host_id", lambda: "another host")
    source = rig.source()
    sink = rig.sink()
    for number in range(2):
        ticket = rig.ticket(source, f"r{number}", [1])
        report = rig.fetch(sink, ticket, [0], [2]).only()
        assert report.ok and report.transport == "tcp"
    forced = rig.sink(transport="shm")
    report = rig.fetch(forced, rig.ticket(source, "forced", [1]), [0], [2]).only()
    assert report.failed == (0,) and "one host" in report.reason


def test_a_pool_that_is_another_one_falls_back_to_tcp(rig: Rig) -> None:
    theirs, decoy, ours = rig.memory(), rig.memory(), rig.memory()
    scramble(theirs)
    source = rig.source(theirs)
    source._cuts.of(1).halves["shm"]._path = decoy.path  # type: ignore[attr-defined]
    ticket = msgspec.structs.replace(rig.ticket(source, "r", [1]), place=None)
    report = rig.fetch(rig.sink(ours), ticket, [0], [2]).only()
    assert report.ok and report.transport == "tcp"
    assert ours.view(2) == theirs.view(1)


# The offer ends during the fetch.


def test_withdrawn_while_sent_over_tcp(rig: Rig) -> None:
    theirs, ours = rig.memory(3, BIG), rig.memory(3, BIG)
    gate = Gate("tcp")
    source, sink = rig.source(theirs), rig.sink(ours, halves=gate.halves())
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 1, 2]), range(3), range(3))
    assert gate.reached.wait(10)
    assert rig.returned.got == []
    source.withdraw("r")
    assert rig.returned.wait(timeout_s=1.0) == [("r", "withdrawn")]
    gate.opened.set()
    report = reports.only()
    assert report.failed and 0 not in report.failed
    assert len(rig.returned.got) == 1


def test_withdrawn_while_copied_from_shared_memory(rig: Rig) -> None:
    """The source sees no reader and reuses the blocks; the reader must find out and report all."""
    theirs, ours = rig.memory(4), rig.memory(4)
    scramble(theirs)
    gate = Gate("shm", COPIED_BYTES)
    source, sink = rig.source(theirs), rig.sink(ours, halves=gate.halves())
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 1]), range(2), range(2))
    assert gate.reached.wait(10)
    source.withdraw("r")
    assert rig.returned.wait(timeout_s=1.0) == [("r", "withdrawn")]
    poison(theirs)
    gate.opened.set()
    report = reports.only()
    assert report.failed == (0, 1)
    assert "lease" in report.reason


def test_a_slow_fetch_keeps_its_lease(rig: Rig, transport: str, gate: Gate) -> None:
    theirs = rig.memory()
    scramble(theirs)
    source, sink = rig.source(theirs, lease_s=0.4), rig.sink(halves=gate.halves())
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 1]), range(2), range(2))
    assert gate.reached.wait(10)
    time.sleep(1.0)  # two and a half leases
    assert rig.returned.got == []
    gate.opened.set()
    assert reports.only().ok
    assert rig.returned.wait() == [("r", "committed")]


# The source dies, hangs, restarts.


@pytest.fixture
def ours(rig: Rig) -> HostMemory:
    memory = rig.memory(4, BIG)
    poison(memory)
    return memory


def test_blocks_from_another_process_are_identical(
    rig: Rig, transport: str, ours: HostMemory
) -> None:
    theirs = rig.memory(4, BIG)
    scramble(theirs)
    child, sink = rig.child(transport, 4, BIG), rig.sink(ours, transport=transport)
    report = rig.fetch(sink, child.ticket("r", 4), range(4), [3, 2, 1, 0]).only()
    assert report.ok and report.transport == transport
    assert all(ours.view(3 - index) == theirs.view(index) for index in range(4))


def test_source_killed_in_the_middle(
    rig: Rig, transport: str, gate: Gate, ours: HostMemory
) -> None:
    child, sink = rig.child(transport, 4, BIG), rig.sink(ours, halves=gate.halves())
    reports = rig.fetch(sink, child.ticket("r", 4), range(4), range(4))
    assert gate.reached.wait(10)
    child.kill()
    gate.opened.set()
    report = reports.only(timeout_s=4.0)
    assert report.failed and report.reason
    end = time.monotonic() + 10
    while not sink.counters().failed_releases:  # after the report
        assert time.monotonic() < end, "a release that failed is not counted"
        time.sleep(0.01)


def test_source_that_hangs(rig: Rig, transport: str, ours: HostMemory) -> None:
    child, sink = rig.child(transport, 4, BIG), rig.sink(ours, transport=transport, stall_s=0.3)
    assert rig.fetch(sink, child.ticket("warm", 1), [0], [0]).only().ok
    ticket = child.ticket("r", 1)
    child.stop()
    begun = time.monotonic()
    report = rig.fetch(sink, ticket, [0], [1]).only()
    assert report.failed == (0,) and "said nothing for 0.3 s" in report.reason
    assert time.monotonic() - begun < 3.0
    assert is_poison(ours, 1)


def test_a_silent_source_does_not_keep_others_waiting(rig: Rig, ours: HostMemory) -> None:
    """It holds all threads but one for as long as a stall may last."""
    child, sink = rig.child("tcp", 4, BIG), rig.sink(ours, threads=3, stall_s=PATIENCE_S)
    tickets = [child.ticket(f"r{number}", 1) for number in range(4)]
    assert rig.fetch(sink, tickets.pop(), [0], [0]).only().ok
    child.stop()
    silent = [rig.fetch(sink, ticket, [0], [1 + n]) for n, ticket in enumerate(tickets)]
    theirs = rig.memory(4, BIG)
    other = rig.source(theirs, worker_id="prefill-other")
    for number in range(5):
        ticket = rig.ticket(other, f"other-{number}", [number % 4])
        assert rig.fetch(sink, ticket, [0], [0]).only(timeout_s=PATIENCE_S / 2).ok
    assert not any(reports.got for reports in silent)
    for number in range(3):
        sink.cancel(f"r{number}")
    assert all(reports.only().failed for reports in silent)


def test_source_restarted_on_the_same_port(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    poison(ours)
    sink = rig.sink(ours, transport=transport)
    source = rig.source(theirs)
    for epoch in range(8, 12):
        assert rig.fetch(sink, rig.ticket(source, f"a{epoch}", [1]), [0], [1]).only().ok
        rig.returned.wait(2 * (epoch - 8) + 1)
        stale = rig.ticket(source, f"b{epoch}", [2])
        source.close()
        source = rig.source(theirs, epoch=epoch, port=source.port)
        report = rig.fetch(sink, stale, [0], [2]).only()
        assert report.failed == (0,) and "restarted" in report.reason
        assert is_poison(ours, 2)
    endings = [ending for _, ending in rig.returned.wait(8)]
    assert endings == ["committed", "closed"] * 4


def test_nothing_stays_mapped_when_a_source_dies(rig: Rig, ours: HostMemory) -> None:
    gc.collect()
    before = pools_held()
    child, sink = rig.child("shm", 4, BIG), rig.sink(ours, threads=3)
    tickets = [child.ticket(f"r{number}", 2) for number in range(6)]
    reports = Reports()
    for number, ticket in enumerate(tickets):
        sink.fetch(ticket, [number % 2], [number % 4], time.monotonic() + 10, reports.done)
    assert all(report.ok for report in reports.wait(6))
    # The pool and the ledger, mapped once, whatever the threads.
    assert pools_held() == (before[0] + 2, before[1] + 2)
    child.kill()
    assert until(lambda: pools_held() == before, 5.0), pools_held()


# The own side changes its mind.


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Accepts connections in the kernel and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_cancel_ends_a_fetch_that_waits_for_the_source(
    rig: Rig, silent: socket.socket, transport: str
) -> None:
    sink = rig.sink(transport=transport, threads=1)
    ticket = msgspec.structs.replace(
        rig.ticket(rig.source(), "active", [1]), port=silent.getsockname()[1]
    )
    active = rig.fetch(sink, ticket, [0], [1])
    queued = rig.fetch(sink, msgspec.structs.replace(ticket, request_id="queued"), [0], [2])
    sink.cancel("queued")
    assert "cancelled" in queued.only(timeout_s=1.0).reason
    assert active.got == []
    sink.cancel("active")
    report = active.only(timeout_s=1.0)
    assert report.failed == (0,) and "cancelled" in report.reason
    sink.cancel("active")
    sink.cancel("unknown")
    assert len(active.got) == len(queued.got) == 1


def test_cancel_in_the_middle_tells_the_source(rig: Rig, transport: str, gate: Gate) -> None:
    theirs, ours = rig.memory(3, BIG), rig.memory(3, BIG)
    poison(ours)
    source, sink = rig.source(theirs), rig.sink(ours, halves=gate.halves())
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 1, 2]), range(3), range(3))
    assert gate.reached.wait(10)
    sink.cancel("r")
    gate.opened.set()
    report = reports.only(timeout_s=2.0)
    assert "cancelled" in report.reason
    assert rig.returned.wait(timeout_s=2.0) == [("r", "aborted")]
    assert is_poison(ours, 2)


def test_close_while_fetching_reports_everything(
    rig: Rig, silent: socket.socket, transport: str
) -> None:
    sink = rig.sink(transport=transport, threads=2)
    ticket = msgspec.structs.replace(
        rig.ticket(rig.source(), "r", [1]), port=silent.getsockname()[1]
    )
    reports = Reports()
    for number in range(20):
        other = msgspec.structs.replace(ticket, request_id=f"r{number}")
        sink.fetch(other, [0], [number], time.monotonic() + 30, reports.done)
    begun = time.monotonic()
    sink.close()
    assert time.monotonic() - begun < 2.5
    got = reports.wait(20, timeout_s=0.1)
    assert sorted(report.request_id for report in got) == sorted(f"r{n}" for n in range(20))
    assert all(report.failed == (0,) and "closed" in report.reason for report in got)
    late = rig.fetch(sink, ticket, [0], [1])
    assert "closed" in late.only(timeout_s=0.1).reason
    assert sink.counters().fetching == 0


def test_closing_a_source_in_the_middle(rig: Rig, transport: str, gate: Gate) -> None:
    theirs, ours = rig.memory(3, BIG), rig.memory(3, BIG)
    source, sink = rig.source(theirs), rig.sink(ours, halves=gate.halves())
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 1, 2]), range(3), range(3))
    assert gate.reached.wait(10)
    begun = time.monotonic()
    source.close()
    assert time.monotonic() - begun < 2.0
    assert rig.returned.got == [("r", "closed")]
    gate.opened.set()
    assert reports.only().failed


def test_a_done_that_raises_hurts_nobody(rig: Rig, transport: str) -> None:
    source, sink = rig.source(), rig.sink(transport=transport, threads=1)

    def fail(report: object) -> None:
        raise RuntimeError("boom")

    sink.fetch(rig.ticket(source, "a", [1]), [0], [1], time.monotonic() + 10, fail)
    assert rig.fetch(sink, rig.ticket(source, "b", [1]), [0], [1]).only().ok
    assert rig.returned.wait(2) == [("a", "committed"), ("b", "committed")]


def test_a_fault_in_a_transport_is_reported(rig: Rig) -> None:
    class Broken:
        borrows = False

        def receive(self, *_: object) -> Arriving:
            raise ZeroDivisionError("a bug")

    def make(pool: object) -> SinkHalf:
        return Broken()

    source, sink = rig.source(), rig.sink(halves={"tcp": make}, threads=1)
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [1]).only()
    assert report.failed == (0,) and "a bug" in report.reason
    assert rig.returned.wait() == [("r", "failed")]
