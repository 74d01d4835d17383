"""Pools, mappings of pools, runs of blocks."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_rig import Rig, scramble

from pdserve.kv_transfer.memory import (
    HostMemory,
    MappedPool,
    PoolError,
    Spans,
    host_id,
    runs,
)
from pdserve.kv_transfer.transports import offered_transports


def test_a_mapping_shows_what_the_owner_writes(rig: Rig) -> None:
    memory = rig.memory(5, 1000)
    pool = MappedPool(memory.path, 1000, memory.nonce)
    scramble(memory)
    assert pool.num_blocks == 5
    assert pool.span(1, 3).tobytes() == b"".join(bytes(memory.view(i)) for i in (1, 2, 3))
    assert not pool.span(0).flags.writeable


def test_a_mapping_outlives_its_owner(rig: Rig) -> None:
    memory = HostMemory(2, 10)
    memory.view(1)[:] = b"0123456789"
    pool = MappedPool(memory.path, 10, memory.nonce)
    memory.close()
    del memory
    assert pool.span(1).tobytes() == b"0123456789"


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (5, 1), (4, 2), (0, 6), (0, 0)])
def test_spans_stay_inside(rig: Rig, first: int, count: int) -> None:
    memory = rig.memory(5, 100)
    with pytest.raises(PoolError, match="outside"):
        MappedPool(memory.path, 100, memory.nonce).span(first, count)
    with pytest.raises(IndexError, match="outside"):
        Spans(memory).span(first, count)


def test_spans_are_the_blocks(rig: Rig) -> None:
    memory = rig.memory(5, 100)
    Spans(memory).span(2, 2)[:] = 9
    assert bytes(memory.view(2)) == bytes(memory.view(3)) == b"\x09" * 100
    assert bytes(memory.view(1)) == bytes(memory.view(4)) == bytes(100)


def test_spans_need_blocks_back_to_back(rig: Rig) -> None:
    class Scattered(HostMemory):
        def view(self, block_id: int) -> memoryview:
            return super().view(0)

    memory = Scattered(3, 10)
    with pytest.raises(ValueError, match="back to back"):
        Spans(memory)
    memory.close()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "/proc/self/fd/1", "/proc/1/fd/../exe"])
def test_only_descriptors_of_processes_are_opened(path: str) -> None:
    with pytest.raises(PoolError, match="must look like"):
        MappedPool(path, 10, b"n" * 16)


def test_wrong_pools_are_refused(rig: Rig) -> None:
    memory = rig.memory(5, 100)
    with pytest.raises(PoolError, match="nonce differs"):
        MappedPool(memory.path, 100, b"n" * 16)
    with pytest.raises(PoolError, match="nonce differs"):
        MappedPool(memory.path, 100, b"")
    with pytest.raises(PoolError, match="whole number"):
        MappedPool(memory.path, 99, memory.nonce)
    with pytest.raises(PoolError, match="cannot be opened"):
        MappedPool(f"/proc/{os.getpid()}/fd/9999", 100, memory.nonce)
    with tempfile.TemporaryFile() as file:
        with pytest.raises(PoolError, match="not a memory file"):
            MappedPool(f"/proc/{os.getpid()}/fd/{file.fileno()}", 100, memory.nonce)


def test_a_pipe_in_place_of_a_pool_does_not_block() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(PoolError):
            MappedPool(f"/proc/{os.getpid()}/fd/{reading}", 100, b"n" * 16)
    finally:
        os.close(reading)
        os.close(writing)


@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 5))
def test_runs_spell_out_the_blocks(blocks: list[int], longest: int) -> None:
    merged = list(runs(blocks, longest))
    assert [block for first, count in merged for block in range(first, first + count)] == blocks
    assert all(1 <= count <= longest for _, count in merged)


def test_runs_merge_what_is_adjacent() -> None:
    assert list(runs([4, 5, 6, 9, 8, 9], 10)) == [(4, 3), (9, 1), (8, 2)]


def test_host_id_is_stable_and_says_the_user() -> None:
    assert host_id() == host_id()
    assert host_id().endswith(f"/{os.getuid()}")


def test_offered_transports(rig: Rig) -> None:
    shared, private = rig.memory(), rig.memory()
    private.path = ""
    assert offered_transports(shared, "auto") == ("shm", "tcp")
    assert offered_transports(private, "auto") == ("tcp",)
    assert offered_transports(shared, "shm") == ("shm",)
    with pytest.raises(ValueError, match="choose tcp or auto"):
        offered_transports(private, "shm")
    with pytest.raises(ValueError, match="one of auto, shm, tcp"):
        offered_transports(shared, "pigeon")


def test_wrong_settings_are_sentences(rig: Rig) -> None:
    with pytest.raises(ValueError, match="one of auto, shm, tcp"):
        rig.sink(transport="pigeon")
    with pytest.raises(ValueError, match="Transports are"):
        rig.source(transports=("pigeon",))
    private = rig.memory()
    private.path = ""
    with pytest.raises(PoolError, match="must look like"):
        rig.source(private)


def test_a_port_in_use_is_an_error_that_leaves_nothing(rig: Rig) -> None:
    source = rig.source()
    with pytest.raises(OSError, match="in use"):
        rig.source(port=source.port)
