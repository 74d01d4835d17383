"""The CUDA IPC transport's logic over a stand-in for the runtime (support/fake_ipc.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import msgspec
import pytest
import torch
from fake_ipc import FakeDriver
from transfer_rig import Reports, Rig

from pdserve.kernels import copy_blocks_summed, sum_blocks
from pdserve.kv_transfer import cuda_ipc, device_sums
from pdserve.kv_transfer.cuda_ipc import open_ipc
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.device_sums import KIND
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES, TransportSettingError
from pdserve.protocol.transfer import FetchHeader

BLOCKS, NBYTES = 16, 1000
STALL_S = 0.3


def pool(seed: int, nbytes: int = NBYTES) -> torch.Tensor:
    """Somewhere within a larger allocation, as torch's allocator gives it."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 256, (BLOCKS + 2, nbytes), dtype=torch.uint8, generator=generator)
    return whole[1:-1]


class Ends:
    """A source and a sink on two pools of one fake driver."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.driver = rig, FakeDriver()
        self.theirs, self.ours = pool(1), pool(2)
        self.source, self.sink = self.new_source(7), self.new_sink()
        self.requests = 0

    def new_source(self, epoch: int, port: int = 0) -> TransferSource:
        return self.rig.source(
            DeviceMemory(self.theirs),  # type: ignore[arg-type]
            epoch=epoch,
            port=port,
            transports=("ipc", "tcp"),
            halves=cuda_ipc.source_halves(self.driver.runtime(sound=True), SOURCE_HALVES),
            stall_s=STALL_S,
        )

    def new_sink(self, transport: str = "auto") -> TransferSink:
        return self.rig.sink(
            DeviceMemory(self.ours),  # type: ignore[arg-type]
            transport=transport,
            halves=cuda_ipc.sink_halves(self.driver.runtime("0000:02:00.0"), SINK_HALVES),
            stall_s=STALL_S,
        )

    def begin(self, blocks: range = range(8)) -> Reports:
        self.requests += 1
        ticket = self.rig.ticket(self.source, f"r{self.requests}", blocks)
        return self.rig.fetch(self.sink, ticket, range(len(blocks)), blocks)

    def fetch(self, expected: str, blocks: range = range(8)) -> None:
        self.ours[blocks.start : blocks.stop] = 0
        report = self.begin(blocks).only()
        assert report.ok and report.transport == expected, report
        assert torch.equal(self.ours[list(blocks)], self.theirs[list(blocks)])

    def begin_stuck(self) -> Reports:
        """A fetch whose copy has been launched and is not done."""
        self.driver.trouble.stuck = True
        reports = self.begin()
        assert self.driver.trouble.reached.wait(10)
        return reports


@pytest.fixture
def ends(rig: Rig) -> Iterator[Ends]:
    ends = Ends(rig)
    yield ends
    ends.driver.trouble.let_go.set()


def test_warming_up_leaves_the_pool_as_it_was(ends: Ends) -> None:
    before = ends.theirs.clone()
    runtime = ends.driver.runtime(sound=True)
    cuda_ipc.IpcSource(DeviceMemory(ends.theirs), runtime).warm_up()
    assert torch.equal(ends.theirs, before)


def test_a_mapping_is_opened_once_and_closed_with_the_lines(ends: Ends) -> None:
    for _ in range(3):
        ends.fetch("ipc")
    ends.fetch("ipc", range(5, 16))
    assert len(ends.driver.opened) == 1
    ends.sink.close()
    assert ends.driver.opened == []


def test_chunks_are_copied_one_after_the_other(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "CHUNK_BYTES", 3 * NBYTES)
    ends.fetch("ipc", range(16))


def test_a_chunk_is_launched_while_the_one_before_it_is_copied(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops then waits for both, which write into the targets, and launches no more."""
    monkeypatch.setattr(cuda_ipc, "CHUNK_BYTES", 3 * NBYTES)
    marks: list[threading.Event] = []
    launched = threading.Semaphore(0)

    def mark(stream: int) -> SimpleNamespace:
        marks.append(threading.Event())
        launched.release()
        return SimpleNamespace(query=marks[-1].is_set)

    half = ends.sink._cuts.of(1).halves["ipc"]
    assert isinstance(half, cuda_ipc.IpcSink)
    monkeypatch.setattr(half._runtime.streams, "mark", mark)
    reports = ends.begin()
    assert launched.acquire(timeout=10) and launched.acquire(timeout=10)
    ends.sink.cancel("r1")
    marks[0].set()
    time.sleep(0.1)
    assert reports.got == []
    marks[1].set()
    report = reports.only()
    assert report.failed and "cancelled" in report.reason
    assert len(marks) == 2


def test_a_new_epoch_closes_the_mapping(ends: Ends) -> None:
    ends.fetch("ipc")
    port = ends.source.port
    ends.source.close()
    ends.theirs = pool(3)
    ends.source = ends.new_source(8, port)
    ends.fetch("ipc")
    assert ends.driver.opened == [ends.theirs.untyped_storage().data_ptr()]


def test_a_source_that_leaves_is_unmapped(ends: Ends) -> None:
    ends.fetch("ipc")
    ends.source.close()
    end = time.monotonic() + 10
    while ends.driver.opened and time.monotonic() < end:
        threading.Event().wait(0.02)
    assert ends.driver.opened == []


@pytest.mark.parametrize(("switch", "says"), [("far", "cannot read"), ("failing", "mapped")])
def test_what_cannot_be_mapped_goes_another_way(ends: Ends, switch: str, says: str) -> None:
    setattr(ends.driver.trouble, switch, True)
    ends.fetch("tcp")
    ends.sink = ends.new_sink("ipc")
    report = ends.begin().only()
    assert report.failed and says in report.reason
    assert ends.driver.opened == []


def test_a_source_whose_device_fails_says_so(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(device_sums, "sum_blocks", fail)
    ends.fetch("tcp")
    ends.sink = ends.new_sink("ipc")
    report = ends.begin().only()
    assert report.failed and "out of memory" in report.reason


@pytest.mark.parametrize("changes", [{"handle": b"short"}, {"offset": -8}, {"offset": 3}])
def test_a_pool_that_cannot_be_is_not_mapped(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    half = ends.source._cuts.of(1).halves["ipc"]
    assert isinstance(half, cuda_ipc.IpcSource)
    monkeypatch.setattr(half, "_shared", msgspec.structs.replace(half._shared, **changes))
    ends.fetch("tcp")
    assert ends.driver.opened == []
    ends.sink = ends.new_sink("ipc")
    assert "does not know" in ends.begin().only().reason


@pytest.mark.parametrize("changes", [{"num_blocks": 10**6}, {"offset": 8 * NBYTES}])
def test_a_pool_that_would_not_fit_its_allocation_is_not_read(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    half = ends.source._cuts.of(1).halves["ipc"]
    assert isinstance(half, cuda_ipc.IpcSource)
    monkeypatch.setattr(half, "_shared", msgspec.structs.replace(half._shared, **changes))
    ends.sink = ends.new_sink("ipc")
    assert "of an allocation of" in ends.begin().only().reason
    assert ends.driver.opened == []


def test_changed_blocks_are_named_and_fetched_again(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel sees another word than the source has."""

    def wrongly(source: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        source[3, 5] ^= 1
        sums = copy_blocks_summed(source, *rest)
        source[3, 5] ^= 1
        return sums

    monkeypatch.setattr(cuda_ipc, "copy_blocks_summed", wrongly)
    report = ends.begin().only()
    assert report.ok and report.transport == "tcp"
    assert report.nbytes == 9 * NBYTES
    assert torch.equal(ends.ours[:8], ends.theirs[:8])


def test_a_withdrawn_ticket_makes_the_copy_void(ends: Ends) -> None:
    reports = ends.begin_stuck()
    ends.source.withdraw("r1")
    ends.driver.trouble.let_go.set()
    report = reports.only()
    assert report.failed == tuple(range(8)) and "lease" in report.reason


def test_late_copies_are_waited_for_before_their_targets_go_back(ends: Ends) -> None:
    reports = ends.begin_stuck()
    time.sleep(2 * STALL_S)
    assert reports.got == [], "the device may still write into the targets"
    ends.driver.trouble.let_go.set()
    report = reports.only()
    assert report.ok and report.transport == "tcp", "late is unfit: the next one brings them"


def test_a_cancelled_copy_is_waited_for(ends: Ends) -> None:
    reports = ends.begin_stuck()
    ends.sink.cancel("r1")
    time.sleep(0.1)
    assert reports.got == []
    ends.driver.trouble.let_go.set()
    report = reports.only()
    assert report.failed and "cancelled" in report.reason


def test_a_lost_device_is_given_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sums, "LOST_S", 0.5)
    ends.sink = ends.new_sink("ipc")
    report = ends.begin_stuck().only()
    assert report.failed and "has not finished a copy for 0.5 s" in report.reason


def test_the_device_sums_ahead(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offered, all of a ticket at once, before anybody asks for it; the host nothing."""
    summed: list[list[int]] = []
    done = threading.Semaphore(0)

    def sums(words: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        summed.append(blocks.tolist())
        done.release()
        return sum_blocks(words, blocks)

    monkeypatch.setattr(device_sums, "sum_blocks", sums)
    monkeypatch.setattr(DeviceMemory, "digests", lambda self, blocks: pytest.fail("the host's"))
    reports = ends.begin(range(2, 6))
    assert reports.only().transport == "ipc"
    assert done.acquire(timeout=10)
    seen = sorted(block for blocks in summed for block in blocks)
    assert set(seen) == {2, 3, 4, 5}
    ends.rig.ticket(ends.source, "r", [5, 7])
    while summed[-1] != [5, 7]:
        assert done.acquire(timeout=10)


def test_a_mapped_pool_is_copied_from_without_a_word(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.fetch("ipc")

    def asked(*_: object) -> None:
        raise AssertionError("The source was asked.")

    ticket = ends.rig.ticket(ends.source, "r", range(4, 9))
    half = ends.source._cuts.of(1).halves["ipc"]
    assert isinstance(half, cuda_ipc.IpcSource)
    ends.source.outbox.sum_ahead(ticket.ticket_id, KIND, half.digests, 100)
    monkeypatch.setattr(TransferSource, "_send", asked)
    ends.ours[:] = 0
    report = ends.rig.fetch(ends.sink, ticket, range(5), range(5)).only()
    assert report.ok and report.transport == "ipc" and report.nbytes == 5 * NBYTES
    assert torch.equal(ends.ours[:5], ends.theirs[4:9])


def test_other_block_sizes_are_refused(rig: Rig) -> None:
    with pytest.raises(cuda_ipc.TransportUnfit, match="multiple of 8 bytes, not 1001"):
        cuda_ipc.IpcSource(DeviceMemory(pool(1, 1001)), FakeDriver().runtime())


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    memory = DeviceMemory(pool(0))
    assert open_ipc(memory, "auto") is None
    assert open_ipc(object(), "tcp") is None
    with pytest.raises(TransportSettingError, match=r"CUDA device.* Choose another --transport"):
        open_ipc(memory, "ipc")
    with pytest.raises(TransportSettingError, match="pool is on none"):
        open_ipc(object(), "ipc")


def test_a_later_header_cannot_widen_the_mapping(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.fetch("ipc")
    half = ends.source._cuts.of(1).halves["ipc"]
    describe = half.describe

    def lying(header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        header = describe(header, block_ids)
        assert header.pool_device is not None
        more = msgspec.structs.replace(header.pool_device, num_blocks=10**6)
        beyond = tuple(block + 1000 for block in header.pool_blocks)
        return msgspec.structs.replace(header, pool_device=more, pool_blocks=beyond)

    monkeypatch.setattr(half, "describe", lying)
    ends.sink = ends.new_sink("ipc")
    assert "of an allocation of" in ends.begin().only().reason
    monkeypatch.setattr(half, "describe", describe)
    ends.sink = ends.new_sink("ipc")
    assert ends.begin().only().ok
    monkeypatch.setattr(half, "describe", lying)
    monkeypatch.setattr(ends.source._ahead, "_where", None)  # else it would not be asked
    assert "outside its" in ends.begin().only().reason
