"""Which transport a fetch takes: capability, then measured speed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_rig import Rig, scramble

from pdserve.kv_transfer import routes as routes_module
from pdserve.kv_transfer.routes import (
    AGAIN_S,
    FASTER,
    MEASURED_BYTES,
    SOURCES_KEPT,
    UNFIT_S,
    Choice,
    Routes,
)
from pdserve.protocol.ticket import KVTicket

NAMES = ["ipc", "shm", "tcp"]
LARGE, SMALL = MEASURED_BYTES, MEASURED_BYTES - 1


def measured(**speeds: float) -> Choice:
    """A choice that has tried all of these at time 0."""
    choice = Choice()
    for name, speed in speeds.items():
        choice.note(name, LARGE, LARGE / speed)
        choice._tried[name] = 0.0
    return choice


def test_capability_decides_until_something_is_measured() -> None:
    choice = Choice()
    assert choice.order(NAMES, SMALL, 0.0) == NAMES
    assert choice.order(NAMES, LARGE, 0.0) == NAMES
    assert choice.order([], LARGE, 0.0) == []


def test_each_alternative_is_measured_once_and_then_again_after_long() -> None:
    choice = Choice()
    taken = []
    for now in range(6):
        taken.append(choice.order(NAMES, LARGE, float(now))[0])
        choice.note(taken[-1], LARGE, 1.0)
    assert taken == ["ipc", "shm", "tcp", "ipc", "ipc", "ipc"]
    assert choice.order(NAMES, SMALL, 2 * AGAIN_S)[0] == "ipc"
    assert choice.order(NAMES, LARGE, 2 * AGAIN_S)[0] == "shm"
    assert choice.order(NAMES, LARGE, 2 * AGAIN_S)[0] == "tcp"
    assert choice.order(NAMES, LARGE, 2 * AGAIN_S)[0] == "ipc"


def test_clearly_faster_wins_for_fetches_of_any_size() -> None:
    assert measured(ipc=1e9, shm=1.1 * FASTER * 1e9).order(NAMES, SMALL, 1.0)[0] == "shm"
    assert measured(ipc=1e9, shm=0.9 * FASTER * 1e9).order(NAMES, SMALL, 1.0)[0] == "ipc"
    order = measured(ipc=1e9, shm=2e9, tcp=5e9).order(NAMES, LARGE, 1.0)
    assert order == ["tcp", "ipc", "shm"]


def test_old_measurements_fade() -> None:
    choice = measured(ipc=1e9, shm=3e9)
    for _ in range(20):
        choice.note("shm", LARGE, LARGE / 0.5e9)
    assert choice.speeds["shm"] == pytest.approx(0.5e9, rel=0.01)
    assert choice.order(NAMES[:2], SMALL, 1.0) == ["ipc", "shm"]


def test_small_or_timeless_fetches_do_not_count() -> None:
    choice = Choice()
    choice.note("tcp", SMALL, 1e-9)
    choice.note("tcp", LARGE, 0.0)
    assert choice.speeds == {}


@given(
    st.lists(st.sampled_from(NAMES), unique=True),
    st.dictionaries(st.sampled_from(NAMES), st.floats(1e3, 1e12)),
    st.integers(0, 2 * LARGE),
    st.floats(0, 1e6),
)
def test_an_order_is_always_all_of_the_names(
    names: list[str], speeds: dict[str, float], nbytes: int, now: float
) -> None:
    choice = measured(**speeds)
    order = choice.order(names, nbytes, now)
    assert sorted(order) == sorted(names)


@pytest.fixture
def ticket(rig: Rig) -> KVTicket:
    return rig.ticket(rig.source(), "r", [0])


def test_unfit_transports_rest_unless_nothing_else_is_left(ticket: KVTicket) -> None:
    now = 0.0
    routes = Routes(NAMES, clock=lambda: now)
    assert routes.plan(ticket, SMALL) == ["shm", "tcp"]  # what the ticket offers
    routes.avoid(ticket, "shm")
    assert routes.plan(ticket, SMALL) == ["tcp"]
    assert routes.plan(msgspec.structs.replace(ticket, epoch=8), SMALL) == ["shm", "tcp"]
    routes.avoid(ticket, "tcp")
    assert routes.plan(ticket, SMALL) == ["shm", "tcp"]
    now = UNFIT_S
    assert routes.plan(ticket, SMALL) == ["shm", "tcp"]


def test_speeds_are_kept_per_source_and_not_for_ever(ticket: KVTicket) -> None:
    routes = Routes(NAMES)
    routes.measured("prefill-0", "shm", LARGE, 1.0)
    routes.measured("prefill-0", "tcp", LARGE, 0.1)
    assert routes.plan(ticket, SMALL) == ["tcp", "shm"]
    other = msgspec.structs.replace(ticket, source="prefill-1")
    assert routes.plan(other, SMALL) == ["shm", "tcp"]
    assert routes.speeds() == {"prefill-0": {"shm": LARGE, "tcp": 10.0 * LARGE}}
    for number in range(2 * SOURCES_KEPT):
        routes.measured(f"worker-{number}", "tcp", LARGE, 1.0)
    assert len(routes.speeds()) == SOURCES_KEPT and "prefill-0" not in routes.speeds()


def test_a_sink_measures_and_reports(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MEASURED_BYTES", 1000)
    theirs = rig.memory()
    scramble(theirs)
    source, sink = rig.source(theirs), rig.sink()
    taken = []
    for number in range(3):
        ticket = rig.ticket(source, f"r{number}", [1, 2])
        report = rig.fetch(sink, ticket, [0, 1], [1, 2]).only()
        assert report.ok
        taken.append(report.transport)
    assert set(taken[:2]) == {"shm", "tcp"}, "the alternative is measured with the second fetch"
    speeds = sink.counters().speeds["prefill-0"]
    assert set(speeds) == {"shm", "tcp"} and min(speeds.values()) > 0


def test_a_forced_transport_is_not_left(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MEASURED_BYTES", 1000)
    source, sink = rig.source(), rig.sink(transport="tcp")
    for number in range(3):
        ticket = rig.ticket(source, f"r{number}", [1])
        assert rig.fetch(sink, ticket, [0], [1]).only().transport == "tcp"
