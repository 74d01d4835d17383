"""The NCCL transport's logic over a fake of CuPy's module: sessions, stuck calls, fallback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from fake_nccl import FakeNccl
from transfer_rig import Reports, Rig

from pdserve.kernels import scatter_blocks
from pdserve.kv_transfer import nccl as nccl_module
from pdserve.kv_transfer import nccl_owner as owner_module
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.line import Address, connect
from pdserve.kv_transfer.nccl import open_nccl, sink_halves, source_halves
from pdserve.kv_transfer.nccl_owner import NcclTrouble, Owner, load_nccl
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import (
    SINK_HALVES,
    SOURCE_HALVES,
    TransportSettingError,
    TransportUnfit,
)
from pdserve.protocol.transfer import Fetch, FetchHeader, Ready, ToReader
from pdserve.protocol.wire import MessageDecoder

BLOCKS, NBYTES = 16, 1000
TO_READER: MessageDecoder[object] = MessageDecoder(ToReader)
STALL_S = 0.4


def pool(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BLOCKS, NBYTES), dtype=torch.uint8, generator=generator)


class Ends:
    """A source and a sink on two pools, each with an owner thread of its own."""

    def __init__(self, rig: Rig, fake: FakeNccl) -> None:
        self.rig, self.fake = rig, fake
        self.theirs, self.ours = pool(1), pool(2)
        self.owners: list[Owner] = []
        self.source = self.new_source(7)
        self.sink = self.new_sink()
        self.requests = 0

    def owner(self, version: int = 0) -> Owner:
        owner = Owner(self.fake, self.fake.streams, init_s=STALL_S)
        owner.version = version or owner.version
        self.owners.append(owner)
        return owner

    def new_source(self, epoch: int, port: int = 0) -> TransferSource:
        return self.rig.source(
            DeviceMemory(self.theirs),  # type: ignore[arg-type]
            epoch=epoch,
            port=port,
            transports=("nccl", "tcp"),
            halves=source_halves(self.owner(), SOURCE_HALVES),
            stall_s=STALL_S,
        )

    def new_sink(self, transport: str = "auto", version: int = 0) -> TransferSink:
        return self.rig.sink(
            DeviceMemory(self.ours),  # type: ignore[arg-type]
            transport=transport,
            halves=sink_halves(self.owner(version), SINK_HALVES),
            stall_s=STALL_S,
        )

    def begin(self, blocks: range = range(8)) -> Reports:
        self.requests += 1
        ticket = self.rig.ticket(self.source, f"r{self.requests}", blocks)
        return self.rig.fetch(self.sink, ticket, range(len(blocks)), blocks)

    def fetch(self, expected: str, blocks: range = range(8)) -> None:
        self.ours[blocks.start : blocks.stop] = 0
        report = self.begin(blocks).only()
        assert report.ok, report
        assert report.transport == expected
        assert torch.equal(self.ours[list(blocks)], self.theirs[list(blocks)])

    @property
    def sessions(self) -> int:
        return len({session for session, _ in self.fake.joined})

    def close(self) -> None:
        self.fake.misbehaviour.let_go.set()
        for owner in self.owners:
            owner.close()


@pytest.fixture
def ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(owner_module, "ABORT_S", 0.2)
    monkeypatch.setattr(nccl_module, "STAGING_BYTES", 3 * NBYTES)  # several sends per fetch
    ends = Ends(rig, FakeNccl())
    yield ends
    ends.close()
    rig.close()
    end = time.monotonic() + 5  # what was stuck has been let go
    while any("nccl" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)


def test_blocks_arrive_in_one_communicator(ends: Ends) -> None:
    for _ in range(3):
        ends.fetch("nccl")
    ends.fetch("nccl", range(5, 16))
    assert ends.sessions == 1 and len(ends.fake.joined) == 2
    assert ends.fake.aborted == []
    assert len(ends.rig.returned.wait(4)) == 4


def test_many_at_once_share_the_pair(ends: Ends) -> None:
    reports = [ends.begin(range(number, number + 1)) for number in range(BLOCKS)]
    assert all(r.only().ok and r.only().transport == "nccl" for r in reports)
    assert torch.equal(ends.ours, ends.theirs)
    assert ends.sessions == 1


def test_a_stuck_transfer_goes_on_over_tcp_in_the_middle_of_the_request(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.fake.misbehaviour.stuck_transfers = True
    begun = time.monotonic()
    ends.fetch("tcp")
    assert time.monotonic() - begun < 3 * STALL_S + 1
    ends.fake.misbehaviour.stuck_transfers = False
    begun = time.monotonic()
    ends.fetch("tcp")  # the pair is in quarantine
    assert time.monotonic() - begun < STALL_S
    assert (len(ends.rig.returned.wait(3, timeout_s=5.0))) == 3
    session = ends.fake.joined[0][0]
    end = time.monotonic() + 5
    while set(ends.fake.aborted) != {(session, 0), (session, 1)}:
        assert time.monotonic() < end, "both ends give the communicator up"
        time.sleep(0.01)


def test_after_the_quarantine_a_new_session_is_made(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.fake.misbehaviour.failing = True
    ends.fetch("tcp")
    ends.fake.misbehaviour.failing = False
    ends.sink._routes._unfit.clear()
    ends.fetch("nccl")
    assert ends.sessions == 2


def test_a_stuck_join_is_bounded_and_its_thread_replaced(ends: Ends) -> None:
    ends.fake.misbehaviour.stuck_joins = True
    begun = time.monotonic()
    ends.fetch("tcp")
    assert time.monotonic() - begun < 3 * STALL_S + 1
    end = time.monotonic() + 5
    while [owner.lost for owner in ends.owners] != [1, 1]:
        assert time.monotonic() < end
        time.sleep(0.01)
    ends.fake.misbehaviour.stuck_joins = False
    ends.sink._routes._unfit.clear()
    ends.fetch("nccl")


def test_a_process_that_lost_too_many_threads_does_without(ends: Ends) -> None:
    owner = ends.owners[0]
    for _ in range(owner_module.LOST_THREADS + 1):
        with pytest.raises(NcclTrouble, match="in time"):
            owner.call(lambda: ends.fake.misbehaviour.let_go.wait(60), time.monotonic() + 0.05)
    with pytest.raises(NcclTrouble, match="did not come back from 3 calls"):
        owner.call(lambda: None, time.monotonic() + 1)
    ends.fetch("tcp")
    assert ends.fake.joined == []


@pytest.mark.parametrize("what", ["failing", "async_error"])
def test_an_error_falls_back(ends: Ends, what: str) -> None:
    setattr(ends.fake.misbehaviour, what, True)
    ends.fake.misbehaviour.stuck_transfers = what == "async_error"
    ends.fetch("tcp")


def test_an_abort_that_is_stuck_hurts_nobody(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.fake.misbehaviour.stuck_aborts = ends.fake.misbehaviour.stuck_transfers = True
    begun = time.monotonic()
    ends.fetch("tcp")
    assert time.monotonic() - begun < 3 * STALL_S + 2


def test_aborts_that_are_stuck_end_the_use_of_nccl(ends: Ends) -> None:
    owner = ends.owners[0]
    ends.fake.misbehaviour.stuck_aborts = True
    ends.fetch("nccl")
    (place,) = ends.source._cuts.of(1).halves["nccl"]._places.values()  # type: ignore[attr-defined]
    communicator = place.pair.communicator
    for _ in range(owner_module.LOST_THREADS + 1):
        owner.abort(communicator)
    assert "3 calls" in owner.problem


def test_a_reader_that_does_not_join_costs_the_source_nothing(ends: Ends) -> None:
    """Neither a thread nor the next reader's communicator."""
    ticket = ends.rig.ticket(ends.source, "r", [1])
    address = Address("127.0.0.1", ends.source.port, "prefill-0", 7)
    until = time.monotonic() + 10
    line = connect(
        address, secret=ends.rig.secret, name="x#1", deadline=until, attach=lambda line: None
    )
    fetch = Fetch(
        ticket_id=ticket.ticket_id,
        request_id="r",
        epoch=7,
        fingerprint=ends.rig.fingerprint,
        transport="nccl",
        wanted=(0,),
        host_id="",
        detail=f"{ends.fake.version}/",
    )
    line.send(fetch, until)
    assert isinstance(line.receive(TO_READER, until), FetchHeader)
    assert isinstance(line.receive(TO_READER, until), Ready)
    line.close()
    ends.fetch("nccl")
    assert [owner.lost for owner in ends.owners] == [0, 0]
    assert len(ends.fake.joined) == 2


def test_cancel_while_stuck(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.fake.misbehaviour.stuck_transfers = True
    reports = ends.begin()
    assert not reports.got
    ends.sink.cancel("r2")
    report = reports.only(timeout_s=2.0)
    assert "cancelled" in report.reason and report.failed
    assert ("r2", "aborted") in ends.rig.returned.wait(2, timeout_s=5.0)


def test_a_restarted_source_gets_a_new_communicator(ends: Ends) -> None:
    ends.fetch("nccl")
    port = ends.source.port
    ends.source.close()
    ends.source = ends.new_source(8, port)
    ends.fetch("nccl")
    assert ends.sessions == 2
    assert (ends.fake.joined[0][0], 1) in ends.fake.aborted


def test_a_source_that_begins_another_epoch_gets_a_new_communicator(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.source.begin_epoch(8)
    ends.fetch("nccl")
    assert ends.sessions == 2
    assert [owner.lost for owner in ends.owners] == [0, 0]
    assert {rank for _, rank in ends.fake.aborted} == {0, 1}


def test_a_cancelled_fetch_keeps_its_targets_until_they_are_written(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, pending = threading.Event(), ends.fake.operation()

    def scatter(part: torch.Tensor, blocks: torch.Tensor, index: torch.Tensor) -> None:
        scatter_blocks(part, blocks, index)
        ends.fake.streams.add_to_all(pending)
        launched.set()

    monkeypatch.setattr(nccl_module, "scatter_blocks", scatter)
    reports = ends.begin(range(2))
    assert launched.wait(10)
    ends.sink.cancel("r1")
    time.sleep(0.1)
    assert reports.got == [], "the device still writes into the targets"
    pending.done = True
    reports.only()


def test_a_restarted_sink_gets_a_new_communicator(ends: Ends) -> None:
    ends.fetch("nccl")
    ends.sink.close()
    ends.sink = ends.new_sink()
    ends.fetch("nccl")
    assert ends.sessions == 2
    assert (ends.fake.joined[0][0], 0) in ends.fake.aborted


def test_other_versions_do_not_even_begin(ends: Ends) -> None:
    ends.sink = ends.new_sink(version=22700)
    ends.fetch("tcp")
    ends.sink = ends.new_sink(transport="nccl", version=22700)
    report = ends.begin().only()
    assert report.failed and "same version at both ends: 23003 here, 22700 there" in report.reason
    assert ends.fake.joined == []


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TransportUnfit, match="needs a CUDA device"):
        load_nccl()
    memory = DeviceMemory(pool(0))
    assert open_nccl(memory, "auto") is None
    assert open_nccl(object(), "tcp") is None
    with pytest.raises(TransportSettingError, match=r"CUDA device.* Choose another --transport"):
        open_nccl(memory, "nccl")
    with pytest.raises(TransportSettingError, match="KV pool is on none"):
        open_nccl(object(), "nccl")
