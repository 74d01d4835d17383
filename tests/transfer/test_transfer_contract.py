"""What every transport must do, over real sockets and threads."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
from transfer_rig import Reports, Returned, Rig, is_poison, poison, scramble

from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES


@pytest.fixture(params=[*SINK_HALVES, "ipc", "nccl"])
def transport(request: pytest.FixtureRequest, rig: Rig) -> str:
    """Those between devices run over stand-ins for CUDA."""
    rig.between_devices = request.param in ("ipc", "nccl")
    return str(request.param)


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
def source(rig: Rig, theirs: HostMemory, transport: str) -> TransferSource:
    return rig.source(theirs)


@pytest.fixture
def sink(rig: Rig, ours: HostMemory, transport: str) -> TransferSink:
    return rig.sink(ours, transport=transport)


@pytest.mark.parametrize(
    ("blocks", "wanted", "targets"),
    [
        ([0], [0], [63]),
        ([5, 6, 7, 8], [0, 1, 2, 3], [10, 11, 12, 13]),
        ([9, 3, 4, 60, 61, 1], [1, 2, 3, 5], [7, 30, 31, 0]),
        (list(range(63, -1, -1)), list(range(64)), list(range(64))),
        (list(range(64)), list(range(1, 64, 2)), list(range(0, 64, 2))),
    ],
    ids=["one", "run", "scattered", "reversed", "every-other"],
)
def test_exactly_the_wanted_blocks_arrive(
    rig: Rig,
    source: TransferSource,
    sink: TransferSink,
    theirs: HostMemory,
    ours: HostMemory,
    transport: str,
    blocks: list[int],
    wanted: list[int],
    targets: list[int],
) -> None:
    ticket = rig.ticket(source, "r", blocks)
    report = rig.fetch(sink, ticket, wanted, targets).only()
    assert report.ok and report.reason == ""
    assert (report.request_id, report.transport) == ("r", transport)
    assert report.nbytes == len(wanted) * theirs.block_nbytes
    assert report.blocks == len(wanted) and 0 <= report.asking_s < report.took_s < 10
    for index, target in zip(wanted, targets, strict=True):
        assert bytes(ours.view(target)) == bytes(theirs.view(blocks[index]))
    assert all(is_poison(ours, block) for block in set(range(64)) - set(targets))
    assert rig.returned.wait() == [("r", "committed")]
    assert source.counters().outbox.held_blocks == 0
    assert sink.counters().bytes_in == report.nbytes == source.counters().bytes_out


@pytest.mark.parametrize("block_nbytes", [1, 17, 4096, 3 * 2**20], ids=lambda n: f"{n}B")
def test_any_block_size(rig: Rig, transport: str, block_nbytes: int) -> None:
    if transport == "ipc" and block_nbytes % 8:
        pytest.skip("CUDA IPC is not offered for such blocks.")
    theirs, ours = rig.memory(9, block_nbytes), rig.memory(9, block_nbytes)
    scramble(theirs)
    source, sink = rig.source(theirs), rig.sink(ours, transport=transport)
    ticket = rig.ticket(source, "r", [0, 1, 2, 4, 5, 6, 7])
    assert rig.fetch(sink, ticket, range(7), [8, 7, 6, 5, 4, 3, 2]).only().ok
    for index, block in enumerate([0, 1, 2, 4, 5, 6, 7]):
        assert ours.view(8 - index) == theirs.view(block)


def test_nothing_wanted_only_releases(rig: Rig, source: TransferSource, sink: TransferSink) -> None:
    report = rig.fetch(sink, rig.ticket(source, "r", [1, 2]), [], []).only()
    assert report.ok and report.nbytes == 0
    assert rig.returned.wait() == [("r", "committed")]
    assert source.counters().bytes_out == 0


def test_many_at_once(
    rig: Rig, source: TransferSource, sink: TransferSink, theirs: HostMemory, ours: HostMemory
) -> None:
    reports = Reports()
    for number in range(64):
        ticket = rig.ticket(source, f"r{number}", [number])
        sink.fetch(ticket, [0], [63 - number], time.monotonic() + 10, reports.done)
    assert all(report.ok for report in reports.wait(64))
    assert all(ours.view(63 - block) == theirs.view(block) for block in range(64))
    assert len(rig.returned.wait(64)) == 64
    assert source.counters().connections <= 3  # two threads and the keeper, kept open


def test_connections_are_kept(rig: Rig, source: TransferSource, sink: TransferSink) -> None:
    for number in range(5):
        assert rig.fetch(sink, rig.ticket(source, f"r{number}", [1]), [0], [1]).only().ok
    assert source.counters().connections == 1


def test_another_layout_is_named_and_released(
    rig: Rig, ours: HostMemory, source: TransferSource, transport: str
) -> None:
    other = msgspec.structs.replace(rig.fingerprint, num_layers=3)
    sink = rig.sink(ours, transport=transport, fingerprint=other)
    report = rig.fetch(sink, rig.ticket(source, "r", [1, 2]), [0, 1], [3, 4]).only()
    assert report.failed == (0, 1)
    assert "num_layers: 3 here, 2 there" in report.reason
    assert rig.returned.wait() == [("r", "failed")]
    assert is_poison(ours, 3)


def test_a_layout_that_the_source_finds_different_is_named(
    rig: Rig, source: TransferSource, ours: HostMemory, transport: str
) -> None:
    """A ticket that lies about its layout does not get past the source."""
    other = msgspec.structs.replace(rig.fingerprint, weights="other")
    sink = rig.sink(ours, transport=transport, fingerprint=other)
    ticket = msgspec.structs.replace(rig.ticket(source, "r", [1]), fingerprint=other)
    report = rig.fetch(sink, ticket, [0], [3]).only()
    assert report.failed == (0,)
    assert "weights: 'w' here, 'other' there" in report.reason
    assert is_poison(ours, 3)


def test_other_block_bytes_are_refused(rig: Rig, source: TransferSource, transport: str) -> None:
    ours = rig.memory(8, 2048)
    poison(ours)
    sink = rig.sink(ours, transport=transport)
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [1]).only()
    assert report.failed == (0,)
    assert "3000 bytes, the own ones 2048" in report.reason
    assert is_poison(ours, 1)


def test_a_ticket_works_once(rig: Rig, source: TransferSource, sink: TransferSink) -> None:
    ticket = rig.ticket(source, "r", [1])
    assert rig.fetch(sink, ticket, [0], [1]).only().ok
    report = rig.fetch(sink, ticket, [0], [2]).only()
    assert report.failed == (0,)
    assert "released or expired" in report.reason
    assert rig.returned.got == [("r", "committed")]


def test_a_withdrawn_ticket_is_refused(
    rig: Rig, source: TransferSource, sink: TransferSink, ours: HostMemory
) -> None:
    ticket = rig.ticket(source, "r", [1])
    source.withdraw("r")
    assert rig.returned.wait() == [("r", "withdrawn")]
    assert rig.fetch(sink, ticket, [0], [2]).only().failed == (0,)
    assert is_poison(ours, 2)
    assert len(rig.returned.got) == 1


def test_a_lease_ends_by_itself(rig: Rig, theirs: HostMemory, sink: TransferSink) -> None:
    source = rig.source(theirs, lease_s=0.2)
    begun = time.monotonic()
    ticket = rig.ticket(source, "r", [1])
    assert rig.returned.wait() == [("r", "expired")]
    assert 0.2 <= time.monotonic() - begun < 1.2
    assert rig.fetch(sink, ticket, [0], [2]).only().failed == (0,)


def test_a_source_with_another_epoch_is_refused(
    rig: Rig, source: TransferSource, sink: TransferSink, ours: HostMemory
) -> None:
    ticket = rig.ticket(source, "r", [1])
    for stale in (
        msgspec.structs.replace(ticket, epoch=6),
        msgspec.structs.replace(ticket, source="prefill-9"),
    ):
        report = rig.fetch(sink, stale, [0], [2]).only()
        assert report.failed == (0,)
        assert "restarted" in report.reason
    assert is_poison(ours, 2)
    assert rig.returned.got == []


def test_a_wrong_secret_gets_nothing(
    rig: Rig, source: TransferSource, ours: HostMemory, transport: str
) -> None:
    sink = rig.sink(ours, transport=transport, secret="another secret")
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [2]).only()
    assert report.failed == (0,)
    assert is_poison(ours, 2)
    assert source.counters().complaints > 0
    assert rig.returned.got == []


def test_callers_mistakes_raise(rig: Rig, source: TransferSource, sink: TransferSink) -> None:
    ticket = rig.ticket(source, "r", [1, 2])
    reports = Reports()
    for wanted, targets, says in [
        ([0], [], "targets"),
        ([1, 0], [1, 2], "ascending"),
        ([0, 2], [1, 2], "outside the ticket"),
        ([-1], [1], "outside the ticket"),
        ([0, 1], [3, 3], "same target"),
        ([0], [64], "outside the pool"),
    ]:
        with pytest.raises(ValueError, match=says):
            sink.fetch(ticket, wanted, targets, time.monotonic() + 1, reports.done)
    with pytest.raises(ValueError, match="outside the pool"):
        rig.ticket(source, "x", [64])
    assert reports.got == []


def test_no_common_transport_is_a_sentence(rig: Rig, theirs: HostMemory) -> None:
    source = rig.source(theirs, transports=("shm",))
    sink = rig.sink(transport="tcp")
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [2]).only()
    assert report.failed == (0,)
    assert "offers the transports shm; this worker uses tcp" in report.reason
    assert rig.returned.wait() == [("r", "failed")]


def test_a_deadline_in_the_past_ends_at_once(
    rig: Rig, source: TransferSource, sink: TransferSink, ours: HostMemory
) -> None:
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [2], within_s=-1.0).only()
    assert report.failed == (0,)
    assert "deadline" in report.reason
    assert is_poison(ours, 2)
    assert rig.returned.wait() == [("r", "failed")]


def test_hand_over_is_quick(rig: Rig, source: TransferSource, sink: TransferSink) -> None:
    """Well under the goal would be flaky on a busy machine; ten times the goal is not."""
    times = []
    for number in range(20):
        ticket = rig.ticket(source, f"r{number}", [1, 2])
        begun = time.perf_counter()
        assert rig.fetch(sink, ticket, [0, 1], [1, 2]).only().ok
        times.append(time.perf_counter() - begun)
    assert sorted(times)[10] < 0.03


def test_auto_prefers_shared_memory_and_does_without(rig: Rig, theirs: HostMemory) -> None:
    sink = rig.sink(transport="auto")
    both = rig.source(theirs)
    assert rig.fetch(sink, rig.ticket(both, "a", [1]), [0], [1]).only().transport == "shm"
    tcp_only = rig.source(theirs, worker_id="prefill-1", transports=("tcp",))
    assert rig.fetch(sink, rig.ticket(tcp_only, "b", [1]), [0], [1]).only().transport == "tcp"


def test_two_sources_one_sink(rig: Rig, ours: HostMemory, sink: TransferSink) -> None:
    pools = [rig.memory(), rig.memory()]
    reports, returned = Reports(), Returned()
    for number, pool in enumerate(pools):
        scramble(pool, seed=number + 1)
    sources = [
        rig.source(pool, worker_id=f"prefill-{number}", on_returned=returned)
        for number, pool in enumerate(pools)
    ]
    for round_number in range(10):
        for number, source in enumerate(sources):
            ticket = rig.ticket(source, f"{number}-{round_number}", [round_number])
            target = 2 * round_number + number
            sink.fetch(ticket, [0], [target], time.monotonic() + 10, reports.done)
    assert all(report.ok for report in reports.wait(20))
    for round_number in range(10):
        for number, pool in enumerate(pools):
            assert ours.view(2 * round_number + number) == pool.view(round_number)
    assert len(returned.wait(20)) == 20


def test_a_busy_thread_does_not_keep_others_waiting_for_ever(
    rig: Rig, source: TransferSource, ours: HostMemory, transport: str
) -> None:
    """`done` runs in a transfer thread; a fetch whose turn does not come ends at its deadline."""
    sink = rig.sink(ours, transport=transport, threads=1)
    entered, let_go = threading.Event(), threading.Event()

    def hog(report: object) -> None:
        entered.set()
        let_go.wait(10)

    sink.fetch(rig.ticket(source, "hog", [1]), [0], [1], time.monotonic() + 10, hog)
    assert entered.wait(10)
    late = rig.fetch(sink, rig.ticket(source, "late", [2]), [0], [2], within_s=0.2)
    report = late.only(timeout_s=2.0)
    assert "deadline" in report.reason and report.failed == (0,)
    let_go.set()
    assert sorted(rig.returned.wait(2)) == [("hog", "committed"), ("late", "failed")]
    assert is_poison(ours, 2)
    assert len(late.got) == 1
