"""Faults on demand: each is noticed, and ends in identical blocks or a named failure."""

from __future__ import annotations

import time

import pytest
from transfer_rig import Reports, Rig, scramble

from pdserve.kv_transfer.faults import Dice, Faults, FaultsError, faulty_sink, faulty_source
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES


@pytest.fixture(params=list(SINK_HALVES))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_specification_says_everything() -> None:
    faults = Faults.parse("seed=7,flip=0.5,delay_s=0.25")
    assert faults == Faults(seed=7, flip=0.5, delay_s=0.25)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("explode=1", "Faults are delay, drop"),
        ("flip", "flip needs a number"),
        ("flip=often", "flip needs a number"),
        ("flip=1.5", "flip must be from 0 to 1"),
        ("drop=-0.1", "drop must be from 0 to 1"),
        ("drop=nan", "drop must be from 0 to 1"),
        ("delay_s=1000", "60 seconds"),
        ("", "Faults are"),
    ],
)
def test_a_wrong_specification_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(FaultsError, match=says):
        Faults.parse(text)


def test_the_same_seed_draws_the_same_faults() -> None:
    faults = Faults(seed=3, flip=0.5, drop=0.3)
    one, other = Dice(faults), Dice(faults)
    draws = [one.draw("flip", "drop") for _ in range(50)]
    assert draws == [other.draw("flip", "drop") for _ in range(50)]
    assert one.count["flip"] > 10 and one.count["drop"] > 3


@pytest.mark.parametrize("fault", ["drop", "truncate", "reorder", "flip"])
def test_a_fault_that_never_ends_is_named(rig: Rig, transport: str, fault: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    dice = Dice(Faults(**{fault: 1.0}))  # type: ignore[arg-type]
    sink = rig.sink(ours, transport=transport, halves=faulty_sink(SINK_HALVES, dice))
    report = rig.fetch(sink, rig.ticket(rig.source(theirs), "r", range(8)), range(8), range(8))
    got = report.only()
    assert got.failed and got.reason
    assert dice.count[fault] == 2
    for index in set(range(8)) - set(got.failed):
        assert ours.view(index) == theirs.view(index)
    assert rig.returned.wait() == [("r", "failed")]


def test_a_block_in_the_place_of_another_is_fetched_again(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    dice = Dice(Faults(duplicate=1.0))
    sink = rig.sink(ours, transport=transport, halves=faulty_sink(SINK_HALVES, dice))
    report = rig.fetch(sink, rig.ticket(rig.source(theirs), "r", range(8)), range(8), range(8))
    assert report.only().ok and dice.count["duplicate"] == 1
    assert all(ours.view(index) == theirs.view(index) for index in range(8))


def test_a_late_block_is_still_right(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    dice = Dice(Faults(delay=1.0, delay_s=0.05))
    source = rig.source(theirs, halves=faulty_source(SOURCE_HALVES, dice))
    sink = rig.sink(ours, transport=transport, halves=faulty_sink(SINK_HALVES, dice))
    begun = time.monotonic()
    assert rig.fetch(sink, rig.ticket(source, "r", [3]), [0], [5]).only().ok
    assert time.monotonic() - begun >= 0.05
    assert ours.view(5) == theirs.view(3)


def test_everything_at_once_on_both_sides(rig: Rig, transport: str) -> None:
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    spec = "seed=5,drop=0.1,truncate=0.1,duplicate=0.1,reorder=0.1,flip=0.1,delay=0.1,delay_s=0.001"
    dice = Dice(Faults.parse(spec))
    source = rig.source(theirs, halves=faulty_source(SOURCE_HALVES, dice))
    sink = rig.sink(ours, transport=transport, halves=faulty_sink(SINK_HALVES, dice))
    reports = Reports()
    for number in range(200):
        first = 4 * (number % 16)
        ticket = rig.ticket(source, f"r{number}", range(first, first + 4))
        targets = range(4 * (number % 4), 4 * (number % 4) + 4)
        reports = rig.fetch(sink, ticket, range(4), targets)
        report = reports.only()
        for index in set(range(4)) - set(report.failed):
            assert ours.view(targets[index]) == theirs.view(first + index)
    assert set(dice.count) == {"delay", "drop", "truncate", "duplicate", "reorder", "flip"}
    assert len(rig.returned.wait(200)) == 200
    assert source.counters().outbox.held_blocks == 0
    outcomes = sink.counters().fetches
    assert outcomes["ok"] > 100, "a second attempt repairs most"
