"""Bytes in flight stay within their limits, and deadlines count from the start of a transfer."""

from __future__ import annotations

import threading

import pytest
from transfer_rig import Gate, Reports, Rig, poison, scramble

from pdserve.kv_transfer.credits import Credits
from pdserve.kv_transfer.job import Ended
from pdserve.kv_transfer.transports import SINK_HALVES

SOON = 10.0


def never() -> None:
    raise Ended("would have waited")


def test_limits_hold_per_source_and_in_all() -> None:
    ledger = Credits(per_source=100, in_all=150)
    assert ledger.take("a", 60, None)
    assert not ledger.take("a", 41, None)
    assert ledger.take("a", 40, None)
    assert not ledger.take("b", 51, None)
    assert ledger.take("b", 50, None)
    assert ledger.in_flight == 150
    ledger.give("a", 60)
    assert ledger.take("b", 50, None)
    ledger.give("a", 40)
    ledger.give("b", 100)
    assert ledger.in_flight == 0


def test_a_block_larger_than_the_limit_travels_alone() -> None:
    ledger = Credits(per_source=10, in_all=20)
    assert ledger.take("a", 1000, None)
    assert not ledger.take("b", 1, None)
    ledger.give("a", 1000)
    assert ledger.take("b", 1, None)


def test_who_waits_is_asked_whether_to_go_on() -> None:
    ledger = Credits(per_source=10, in_all=10)
    assert ledger.take("a", 10, None)
    with pytest.raises(Ended):
        ledger.take("b", 1, never)
    assert ledger.in_flight == 10


def test_credit_that_comes_back_wakes_the_waiting() -> None:
    ledger = Credits(per_source=10, in_all=10)
    got = threading.Event()
    with ledger.account("a") as account:
        assert account.take(10, never)
        assert not account.take(1, never), "does not wait for itself"
        thread = threading.Thread(
            target=lambda: ledger.take("b", 10, lambda: None) and got.set(), daemon=True
        )
        thread.start()
        assert not got.wait(0.1)
    assert got.wait(SOON)
    thread.join(SOON)
    assert ledger.in_flight == 10


def test_limits_must_make_sense(rig: Rig) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        rig.sink(in_flight=0)


@pytest.mark.parametrize("transport", list(SINK_HALVES))
def test_fetches_finish_within_tiny_limits(rig: Rig, transport: str) -> None:
    """Every fetch is larger than the limits; four threads share one block's worth of credit."""
    theirs, ours = rig.memory(32), rig.memory(32)
    scramble(theirs)
    poison(ours)
    gate = Gate(transport)
    gate.opened.set()
    sink = rig.sink(ours, transport=transport, threads=4, in_flight_per_source=1, in_flight=1)
    source, reports = rig.source(theirs), []
    for number in range(8):
        blocks = range(4 * number, 4 * number + 4)
        ticket = rig.ticket(source, f"r{number}", blocks)
        reports.append(rig.fetch(sink, ticket, range(4), blocks))
    assert all(report.only().ok for report in reports)
    assert all(ours.view(block) == theirs.view(block) for block in range(32))
    assert sink.counters().in_flight == 0
    assert sink.counters().routes == {"prefill-0": transport}


def test_a_fetch_without_credit_can_be_cancelled(rig: Rig) -> None:
    gate = Gate("tcp")
    sink = rig.sink(halves=gate.halves(), in_flight=1)
    source = rig.source()
    first: Reports = rig.fetch(sink, rig.ticket(source, "first", [0]), [0], [0])
    assert gate.reached.wait(SOON)
    second: Reports = rig.fetch(sink, rig.ticket(source, "second", [1]), [0], [1])
    assert sink.counters().in_flight == rig.memory().block_nbytes
    sink.cancel("second")
    assert "cancelled" in second.only(timeout_s=2.0).reason
    gate.opened.set()
    assert first.only().ok
    assert sink.counters().in_flight == 0


def test_credit_of_a_failed_fetch_comes_back(rig: Rig) -> None:
    source, sink = rig.source(), rig.sink(transport="tcp")
    ticket = rig.ticket(source, "r", [0, 1])
    source.withdraw("r")
    assert rig.fetch(sink, ticket, [0, 1], [0, 1]).only().failed == (0, 1)
    assert sink.counters().in_flight == 0
    assert sink.counters().routes == {}


def test_a_transfer_that_takes_too_long_from_its_start_is_given_up(rig: Rig) -> None:
    """The request itself has all the time in the world."""
    gate = Gate("shm")
    sink, source = rig.sink(halves=gate.halves(), limit_s=0.3), rig.source()
    reports = rig.fetch(sink, rig.ticket(source, "r", [0, 5]), [0, 1], [0, 5], within_s=600)
    assert gate.reached.wait(SOON)
    assert not gate.opened.wait(0.4)
    gate.opened.set()
    report = reports.only(timeout_s=2.0)
    assert report.failed and "took longer than 0.3 s" in report.reason
    assert rig.returned.wait() == [("r", "failed")]
