"""Blocks whose layers become ready one after the other, and travel so, over every transport."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest
from transfer_rig import FINGERPRINT, PATIENCE_S, POISON, Reports, Rig, poison

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.outbox import Outbox
from pdserve.kv_transfer.slices import slices_of
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import Progress

SIZE, SLICES, SLICE_NBYTES = 16, 4, 800


class Asked:
    """What readers say that they have, when they ask for more: by then they have taken it in."""

    def __init__(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self._have: list[Progress] = []
        self._watch = outbox.watch
        monkeypatch.setattr(outbox, "watch", self._watching)

    def _watching(
        self, ticket_id: str, epoch: int, have: Progress, wait_s: float
    ) -> tuple[Progress, bool]:
        with self._changed:
            self._have.append(have)
            self._changed.notify_all()
        return self._watch(ticket_id, epoch, have, wait_s)

    def wait(self, blocks: int, ahead: int = 0, slices: int = 0) -> None:
        wanted = Progress(blocks=blocks, ahead=ahead, slices=slices)
        with self._changed:
            assert self._changed.wait_for(lambda: wanted in self._have, PATIENCE_S), self._have


class Prompt:
    """Four blocks, the last one with room left, computed slice by slice."""

    BLOCKS, TARGETS = (7, 3, 5, 9), (10, 11, 20, 13)

    def __init__(self, rig: Rig, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.theirs, self.ours = (rig.memory(24, SLICES * SLICE_NBYTES) for _ in range(2))
        for memory in (self.theirs, self.ours):
            poison(memory)
        self.source = rig.source(self.theirs, slices=SLICES)
        self.sink = rig.sink(self.ours, transport=transport)
        self.asked = Asked(self.source.outbox, monkeypatch)
        self.rig = rig

    def open(self, request_id: str = "r") -> KVTicket:
        return self.source.open(request_id, SIZE * 4 - 3, [b"h"] * 3, sliced=True)

    def compute(self, index: int, first: int = 0, end: int = SLICES) -> None:
        """Slices first .. end - 1 of block `index`."""
        view = self.theirs.view(self.BLOCKS[index])
        for part in range(first, end):
            view[part * SLICE_NBYTES :][:SLICE_NBYTES] = bytes([index * 8 + part]) * SLICE_NBYTES

    def arrived(self, index: int, part: int) -> bool:
        """Whether the slice is there; if not, nothing may have been written to its place."""
        found = bytes(self.ours.view(self.TARGETS[index])[part * SLICE_NBYTES :][:SLICE_NBYTES])
        assert found in (bytes([index * 8 + part]) * SLICE_NBYTES, bytes([POISON]) * SLICE_NBYTES)
        return found[0] != POISON

    def fetch(self, ticket: KVTicket, wanted: range = range(4)) -> Reports:
        targets = [self.TARGETS[index] for index in wanted]
        return self.rig.fetch(self.sink, ticket, wanted, targets)


@pytest.fixture(params=["shm", "tcp", "ipc", "nccl"])
def prompt(request: pytest.FixtureRequest, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    rig.between_devices = request.param in ("ipc", "nccl")
    return Prompt(rig, str(request.param), monkeypatch)


def test_layers_travel_while_later_ones_are_computed(prompt: Prompt) -> None:
    ticket = prompt.open()
    assert (ticket.growing, ticket.slices) == (True, SLICES)
    reports = prompt.fetch(ticket)
    prompt.compute(0)
    prompt.source.extend("r", prompt.BLOCKS[:1])
    for end in (1, 3):
        for index in (1, 2, 3):
            prompt.compute(index, 0, end)
        prompt.source.advance(ticket.ticket_id, prompt.BLOCKS[1:], end)
        prompt.asked.wait(1, ahead=3, slices=end)
        for index in (1, 2, 3):
            assert [prompt.arrived(index, part) for part in range(4)] == [
                part < end for part in range(4)
            ]
    assert not reports.got
    for index in (1, 2, 3):
        prompt.compute(index, 3)
    prompt.source.seal("r", prompt.BLOCKS[1:])
    report = reports.only()
    assert report.ok and report.nbytes == 4 * prompt.theirs.block_nbytes, "each slice once"
    assert all(prompt.arrived(index, part) for index in range(4) for part in range(4))
    assert prompt.rig.returned.wait() == [("r", "committed")]
    assert prompt.source.counters().bytes_early >= 13 * SLICE_NBYTES
    assert prompt.sink.counters().in_flight == 0


def test_a_chunk_that_fails_after_some_layers_brings_nothing(prompt: Prompt) -> None:
    ticket = prompt.open()
    reports = prompt.fetch(ticket, range(1, 3))
    prompt.compute(0)
    prompt.source.extend("r", prompt.BLOCKS[:1])
    for index in (1, 2):
        prompt.compute(index, 0, 2)
    prompt.source.advance(ticket.ticket_id, prompt.BLOCKS[1:3], 2)
    prompt.asked.wait(1, ahead=2, slices=2)
    assert prompt.source.cut("r")
    assert reports.only().failed == (1, 2)
    assert prompt.rig.returned.got == []


def test_layers_on_a_device_are_offered_when_they_have_been_computed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.between_devices = True
    prompt = Prompt(rig, "ipc", monkeypatch)
    ticket, done = prompt.open(), threading.Event()
    reports = prompt.fetch(ticket)
    prompt.source.advance(
        ticket.ticket_id, prompt.BLOCKS, 2, lambda: prompt_is(done.wait(PATIENCE_S))
    )
    with pytest.raises(ValueError, match="outside"):
        prompt.source.advance(ticket.ticket_id, [99], 2, lambda: None)
    prompt.asked.wait(0)
    assert prompt.source.outbox.watch(ticket.ticket_id, 7, Progress(), 0.0) == (Progress(), False)
    for index in range(4):
        prompt.compute(index, 0, 2)
    done.set()
    prompt.asked.wait(0, ahead=4, slices=2)
    assert prompt.arrived(3, 1)
    assert prompt.source.cut("r")
    assert reports.only().failed == (0, 1, 2, 3)


def prompt_is(computed: bool) -> None:
    assert computed


def test_a_device_that_fails_offers_nothing_early(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig.between_devices = True
    prompt = Prompt(rig, "ipc", monkeypatch)
    ticket = prompt.open()

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    prompt.source.advance(ticket.ticket_id, prompt.BLOCKS, 2, fail)
    after = threading.Event()
    prompt.source.advance(ticket.ticket_id, prompt.BLOCKS, 3, after.set)
    assert after.wait(PATIENCE_S)
    assert "not offered early" in caplog.text
    assert prompt.source.cut("r")


def test_a_block_that_is_wrong_in_one_slice_is_named(rig: Rig) -> None:
    """The reader's checksum of one slice differs, twice; the rest of the blocks counts."""
    memory = rig.memory(24, SLICES * SLICE_NBYTES)
    ours = rig.memory(24, SLICES * SLICE_NBYTES)
    source = rig.source(memory, slices=SLICES, transports=("tcp",))
    cut = source._cuts.of(SLICES)
    digests = cut.pool.digests

    def wrongly(block_ids: list[int]) -> Sums:
        return digests(block_ids) + (np.asarray(block_ids) == 5 * SLICES + 3).astype(np.uint64)

    cut.pool.digests = wrongly  # type: ignore[method-assign,assignment]
    ticket = source.open("r", SIZE * 3, [b"h"] * 3, sliced=True)
    source.extend("r", [4, 5, 6])
    reports = rig.fetch(rig.sink(ours), ticket, range(3), range(3))
    source.seal("r", [])
    report = reports.only()
    assert report.failed == (1,) and "block 1 differs" in report.reason
    assert rig.returned.wait() == [("r", "failed")]


def test_a_reader_may_take_whole_blocks_all_the_same(rig: Rig) -> None:
    """One that takes parcels does: they are made of all layers."""
    theirs, ours = rig.memory(8, 2 * 2 * 2 * 16 * 8 * 4), rig.memory(16, 2 * 2 * 2 * 8 * 8 * 4)
    source = rig.source(theirs, slices=2)
    halves = msgspec.structs.replace(FINGERPRINT, block_size=8)
    ticket = source.open("r", SIZE * 2, [b"h"] * 2, sliced=True)
    source.extend("r", [1])
    source.advance(ticket.ticket_id, [2], 1)
    reports = rig.fetch(rig.sink(ours, fingerprint=halves), ticket, range(4), range(4))
    source.seal("r", [2])
    report = reports.only()
    assert report.ok and report.nbytes == 2 * theirs.block_nbytes


def test_a_block_must_have_equal_slices(rig: Rig) -> None:
    with pytest.raises(ValueError, match="no 7 equal slices"):
        rig.source(rig.memory(2, 3000), slices=7)


@pytest.mark.parametrize(("layers", "slices"), [(1, 1), (2, 2), (3, 3), (28, 4), (30, 3), (31, 1)])
def test_slices_of_a_model(layers: int, slices: int) -> None:
    assert slices_of(layers) == slices
