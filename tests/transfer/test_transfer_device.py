"""Pools on a device, played by tensors of the host: blocks pass through the staging buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transfer_rig import Rig, scramble

from pdserve.kv_transfer.device import STAGING_BYTES, DeviceMemory, device_memory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink
from pdserve.kv_transfer.memory import Spans
from pdserve.kv_transfer.transports import SINK_HALVES, offered_transports

BLOCKS = 12


def pool(block_nbytes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """[BLOCKS, ...] of random bits."""
    size = BLOCKS * block_nbytes
    bits = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(dtype).view(BLOCKS, 2, -1)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@pytest.mark.parametrize("block_nbytes", [64, 3000, 3 * STAGING_BYTES], ids=lambda n: f"{n}B")
def test_from_device_to_device_over_tcp(rig: Rig, block_nbytes: int) -> None:
    theirs, ours = pool(block_nbytes), pool(block_nbytes, seed=1)
    before = ours.clone()
    source = rig.source(DeviceMemory(theirs), transports=("tcp",))  # type: ignore[arg-type]
    sink = rig.sink(DeviceMemory(ours))  # type: ignore[arg-type]
    ticket = rig.ticket(source, "r", [3, 4, 5, 11, 0])
    report = rig.fetch(sink, ticket, [0, 1, 2, 4], [6, 7, 1, 2]).only()
    assert report.ok and report.transport == "tcp"
    for here, there in {6: 3, 7: 4, 1: 5, 2: 0}.items():
        assert same(ours[here], theirs[there])
    for untouched in set(range(BLOCKS)) - {6, 7, 1, 2}:
        assert same(ours[untouched], before[untouched])


def test_from_host_to_device_over_shared_memory(rig: Rig) -> None:
    theirs, ours = rig.memory(BLOCKS, 3000), pool(3000)
    scramble(theirs)
    sink = rig.sink(DeviceMemory(ours))  # type: ignore[arg-type]
    report = rig.fetch(sink, rig.ticket(rig.source(theirs), "r", [1, 2]), [0, 1], [5, 9]).only()
    assert report.ok and report.transport == "shm"
    assert bytes(ours[9].flatten().view(torch.uint8).numpy()) == bytes(theirs.view(2))


def test_from_device_to_host_over_tcp(rig: Rig) -> None:
    theirs, ours = pool(3000), rig.memory(BLOCKS, 3000)
    source = rig.source(DeviceMemory(theirs), transports=("tcp",))  # type: ignore[arg-type]
    assert rig.fetch(rig.sink(ours), rig.ticket(source, "r", [7]), [0], [4]).only().ok
    assert bytes(ours.view(4)) == bytes(theirs[7].flatten().view(torch.uint8).numpy())


@pytest.mark.parametrize("fault", ["flip", "duplicate", "reorder", "truncate"])
def test_faults_are_noticed_on_a_device_too(rig: Rig, fault: str) -> None:
    theirs, ours = pool(512), pool(512, seed=1)
    dice = Dice(Faults(seed=2, **{fault: 0.5}))  # type: ignore[arg-type]
    source = rig.source(DeviceMemory(theirs), transports=("tcp",))  # type: ignore[arg-type]
    memory = DeviceMemory(ours)
    sink = rig.sink(memory, halves=faulty_sink(SINK_HALVES, dice))  # type: ignore[arg-type]
    for number in range(20):
        report = rig.fetch(sink, rig.ticket(source, f"r{number}", range(6)), range(6), range(6))
        for index in set(range(6)) - set(report.only().failed):
            assert same(ours[index], theirs[index])
        ours.zero_()
    assert dice.count[fault] > 3


def test_digests_are_those_of_the_same_bytes_on_the_host(rig: Rig) -> None:
    memory = rig.memory(BLOCKS, 100)
    scramble(memory)
    tensor = torch.frombuffer(memory.view(0).obj, dtype=torch.uint8, count=BLOCKS * 100).clone()
    device = DeviceMemory(tensor.view(BLOCKS, 100))
    host = Spans(memory)
    assert np.array_equal(device.digests(range(BLOCKS)), host.digests(range(BLOCKS)))


def test_a_write_that_fails_changes_nothing() -> None:
    tensor = pool(64)
    before = tensor.clone()

    def interrupted() -> None:
        with DeviceMemory(tensor).write(3, 2) as part:
            part[:] = 1
            raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        interrupted()
    assert same(tensor, before)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (BLOCKS, 1), (BLOCKS - 1, 2), (0, 0)])
def test_parts_stay_inside(first: int, count: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        DeviceMemory(pool(64)).read(first, count)


def test_only_contiguous_pools_are_taken() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        DeviceMemory(pool(64).transpose(0, 1))


def test_what_a_device_offers() -> None:
    memory = DeviceMemory(pool(64))
    assert offered_transports(memory, "auto") == ("tcp",)
    with pytest.raises(ValueError, match="shm needs a KV pool in shared memory"):
        offered_transports(memory, "shm")
    assert device_memory(torch.zeros(3, 4)) is None


@pytest.mark.gpu
def test_a_pool_on_a_gpu(rig: Rig) -> None:
    theirs, ours = pool(4096).cuda(), pool(4096, seed=1).cuda()
    source = rig.source(device_memory(theirs), transports=("tcp",))
    sink = rig.sink(device_memory(ours))
    report = rig.fetch(sink, rig.ticket(source, "r", range(8)), range(8), range(4, 12)).only()
    assert report.ok
    assert same(ours[4:12].cpu(), theirs[:8].cpu())
