"""Loopback: blocks that do not leave the process, for a worker that fetches what it holds itself.

That happens where a worker has changed its role, or does both: its tickets may come back to it. The
blocks are copied within the pool, by the CPU or on the device, and nothing is mapped.

Both halves of a process share a `Loop`, which no other process can name: a fetch carries its token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from pdserve.kernels.digest import Sums, copy_blocks
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import Pool
from pdserve.kv_transfer.transports import (
    COPIED_BYTES,
    Arriving,
    SinkHalf,
    SourceHalf,
    TransportUnfit,
    Wait,
)
from pdserve.protocol.transfer import Fetch, FetchHeader


@dataclass(frozen=True, slots=True)
class Loop:
    """What makes a process recognise itself."""

    worker_id: str
    token: str = field(default_factory=lambda: secrets.token_hex(16))


class LoopbackSource:
    """Says which blocks they are."""

    seldom = True

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def sliced(self, slices: int) -> LoopbackSource:
        return self

    def objection(self, fetch: Fetch) -> str:
        own = secrets.compare_digest(fetch.detail.encode(), self._loop.token.encode())
        return "" if own else "Loopback is for what a worker fetches from itself."

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return msgspec.structs.replace(header, pool_blocks=tuple(block_ids))

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        """Nothing follows the header."""


class LoopbackSink:
    """Copies within the own pool, in which the source's blocks lie, too."""

    borrows = True

    def __init__(self, pool: Pool, loop: Loop) -> None:
        self._pool, self._loop = pool, loop

    def sliced(self, slices: int) -> LoopbackSink:
        return LoopbackSink(self._pool.sliced(slices), self._loop)

    def reaches(self, source: str) -> bool:
        """Whether blocks of this worker can be had over this transport."""
        return source == self._loop.worker_id

    def detail(self, source: str, epoch: int) -> str:
        """What `Fetch.detail` says."""
        return self._loop.token

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        blocks = header.pool_blocks
        if len(blocks) != len(targets) or not set(blocks) <= set(range(self._pool.num_blocks)):
            raise TransportUnfit("The source did not say where all the wanted blocks lie.")
        pool, chunk = self._pool, max(1, COPIED_BYTES // self._pool.block_nbytes)
        for start in range(0, len(targets), chunk):
            wait()
            there, here = blocks[start : start + chunk], targets[start : start + chunk]
            if isinstance(pool, DeviceMemory):
                yield _copy_on_device(pool, there, here)
            else:  # no block is both: the targets are their request's alone
                data = pool.read(0, pool.num_blocks)
                yield copy_blocks(data, there, data, here, pool.block_nbytes)


def _copy_on_device(pool: DeviceMemory, there: Sequence[int], here: Sequence[int]) -> Sums:
    blocks = pool.blocks
    with pool.stream():
        source = torch.tensor(there, dtype=torch.int64, device=blocks.device)
        target = torch.tensor(here, dtype=torch.int64, device=blocks.device)
        blocks.index_copy_(0, target, blocks.index_select(0, source))
    return pool.digests(here)


def source_halves(
    loop: Loop, others: Mapping[str, Callable[[Pool], SourceHalf]]
) -> dict[str, Callable[[Pool], SourceHalf]]:
    """`others`, after loopback."""
    return {"loopback": lambda pool: LoopbackSource(loop), **others}


def sink_halves(
    loop: Loop, others: Mapping[str, Callable[[Pool], SinkHalf]]
) -> dict[str, Callable[[Pool], SinkHalf]]:
    """`others`, after loopback."""
    return {"loopback": lambda pool: LoopbackSink(pool, loop), **others}
