"""A worker that fetches from itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transfer_rig import HostMemory, Rig, scramble

from pdserve.kernels.digest import Sums, copy_blocks
from pdserve.kv_transfer import loopback
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink, faulty_source
from pdserve.kv_transfer.loopback import Loop
from pdserve.kv_transfer.memory import Spans
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES

SIZE = 16


def on_device(memory: HostMemory) -> DeviceMemory:
    span = Spans(memory).span(0, memory.num_blocks)
    return DeviceMemory(torch.from_numpy(span).view(memory.num_blocks, memory.block_nbytes))


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("slices", [1, 4])
def test_blocks_are_copied_within_the_pool(rig: Rig, place: str, slices: int) -> None:
    memory, loop = rig.memory(), Loop("prefill-0")
    scramble(memory)
    before = [bytes(memory.view(block)) for block in range(memory.num_blocks)]
    pool = on_device(memory) if place == "device" else memory
    giving, taking = (
        loopback.source_halves(loop, SOURCE_HALVES), loopback.sink_halves(loop, SINK_HALVES)
    )  # fmt: skip
    transports = ("loopback", "tcp")
    source = rig.source(pool, halves=giving, transports=transports, slices=slices)
    sink = rig.sink(pool, halves={name: taking[name] for name in transports})
    ticket = source.open("r", SIZE * 4, [b"h"] * 4, sliced=True)
    source.extend("r", [9, 3])
    if slices > 1:
        source.advance(ticket.ticket_id, [60, 1], 2)
    reports = rig.fetch(sink, ticket, range(4), [20, 21, 40, 5])
    source.seal("r", [60, 1])
    report = reports.only()
    assert report.ok and report.transport == "loopback"
    after = [bytes(memory.view(block)) for block in range(memory.num_blocks)]
    for block, target in zip([9, 3, 60, 1], [20, 21, 40, 5], strict=True):
        before[target] = before[block]
    assert after == before
    assert rig.returned.wait() == [("r", "committed")]


def test_a_lease_that_ended_meanwhile_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, loop = rig.memory(), Loop("prefill-0")
    giving, taking = loopback.source_halves(loop, {}), loopback.sink_halves(loop, {})
    source = rig.source(memory, halves=giving, transports=("loopback",))
    sink = rig.sink(memory, halves=taking)

    def copied(*given: Any) -> Sums:
        sums = copy_blocks(*given)
        source.withdraw("r")
        return sums

    monkeypatch.setattr(loopback, "copy_blocks", copied)
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [2]).only()
    assert report.failed == (0,) and "did not confirm" in report.reason


def test_others_take_another_transport_at_once(rig: Rig) -> None:
    """They do not even ask; one that pretends to be the source is refused."""
    theirs, ours = rig.memory(), rig.memory()
    scramble(theirs)
    mine = Loop("prefill-0")
    source = rig.source(
        theirs, halves=loopback.source_halves(mine, SOURCE_HALVES), transports=("loopback", "shm")
    )
    for number, loop in enumerate((Loop("decode-0"), Loop("prefill-0"))):
        sink = rig.sink(ours, halves=loopback.sink_halves(loop, SINK_HALVES))
        report = rig.fetch(sink, rig.ticket(source, f"r{number}", [1]), [0], [2]).only()
        assert report.ok and report.transport == "shm"
        assert ours.view(2) == theirs.view(1)
    forced = rig.sink(ours, halves=loopback.sink_halves(Loop("prefill-0"), {}))
    report = rig.fetch(forced, rig.ticket(source, "forced", [1]), [0], [2]).only()
    assert report.failed == (0,) and "from itself" in report.reason


def test_faults_can_be_injected(rig: Rig) -> None:
    memory, loop = rig.memory(), Loop("prefill-0")
    scramble(memory)
    dice = Dice(Faults(flip=1.0))
    giving = faulty_source(loopback.source_halves(loop, SOURCE_HALVES), dice)
    taking = faulty_sink(loopback.sink_halves(loop, SINK_HALVES), dice)
    source = rig.source(memory, halves=giving, transports=("loopback", "tcp"))
    sink = rig.sink(memory, halves=taking)
    report = rig.fetch(sink, rig.ticket(source, "r", [1]), [0], [2]).only()
    assert report.failed == (0,) and "checksum" in report.reason
