"""Parcels: blocks as the reader wants them, where the two pools are cut differently.

Where layouts are equal, whole blocks travel as they lie in the pool. Else (or where the reader asks
for a smaller form) the reader names its cut (`Parcels`), the source gathers parcels out of its
blocks, checksums are those of the parcels, and the reader scatters each into one of its blocks:

    source's blocks [L, 2, S, H', D] ──gather──► parcel [L, 2, S', h, D] ──scatter──► reader's block

Numbers of parcels are the reader's: parcel i holds its block i of the ticket's tokens. `heads` are
those that both ranks hold, so a rank that needs the heads of several source ranks fetches from each
one's ticket, and one that needs some of a rank's heads asks for just those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from pdserve.kernels import gather_blocks, scatter_blocks
from pdserve.kernels.digest import Bytes
from pdserve.kernels.wire import packed_nbytes
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.layout import Layout, LayoutError
from pdserve.kv_transfer.memory import Pool, runs
from pdserve.protocol.ticket import CONVERTIBLE, RESHAPED, LayoutFingerprint
from pdserve.protocol.transfer import Parcels

WIRES = ("int8", "fp8")
MOST_TOKENS = 1024
"""Of a parcel: what a reader asks for must not exhaust the source's memory."""
MOST_BYTES = 128 * 2**20
"""Of the parcels of one `Fetch`, if they are several; twice what an honest reader asks for."""
LONGEST = 256
"""Parcels gathered at once."""


def layout_of(fingerprint: LayoutFingerprint) -> Layout:
    return Layout(
        num_layers=fingerprint.num_layers,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        block_size=fingerprint.block_size,
        dtype=fingerprint.dtype,
        tp_size=fingerprint.tp_size,
    )


def heads_of(fingerprint: LayoutFingerprint) -> range:
    """The KV heads, numbered in the whole model, that this rank holds."""
    layout = layout_of(fingerprint)
    first = layout.first_head(fingerprint.tp_rank)
    return range(first, first + layout.heads_per_rank)


def agree(
    mine: LayoutFingerprint, theirs: LayoutFingerprint, *, wire: str = "", converts: bool = False
) -> Parcels | None:
    """What a reader with the layout `mine` asks a source with `theirs` for; None: whole blocks.

    Raises LayoutError with a sentence that names the field in which they differ too much."""
    if not wire and mine == theirs:
        return None
    if difference := mine.difference(theirs, apart_from=RESHAPED):
        raise LayoutError(difference)
    if mine.dtype != theirs.dtype:
        if not converts:
            raise LayoutError(
                f"{mine.difference(theirs)} They are converted only where that is asked for."
            )
        if not {mine.dtype, theirs.dtype} <= set(CONVERTIBLE):
            raise LayoutError(
                f"{mine.difference(theirs)} Only {', '.join(CONVERTIBLE)} can be converted."
            )
    if (wire or mine.dtype != theirs.dtype) and mine.batch_invariant:
        raise LayoutError("Batch-invariant workers exchange KV blocks bit by bit: no other dtype.")
    if wire and mine.dtype not in CONVERTIBLE:
        raise LayoutError(
            f"KV blocks in {mine.dtype} cannot travel as {wire}: only {', '.join(CONVERTIBLE)} can."
        )
    own, others = heads_of(mine), heads_of(theirs)
    common = range(max(own.start, others.start), min(own.stop, others.stop))
    if not common:
        raise LayoutError(
            f"Rank {mine.tp_rank} of {mine.tp_size} here holds the KV heads {own.start} to "
            f"{own.stop - 1}, rank {theirs.tp_rank} of {theirs.tp_size} there none of them."
        )
    if not wire and mine.difference(theirs) is None:
        return None
    return Parcels(
        block_size=mine.block_size, first_head=common.start, num_heads=len(common), wire=wire
    )


def objection(mine: LayoutFingerprint, parcels: Parcels, count: int = 1) -> str:
    """Why a source with the layout `mine` cannot make so many such parcels; "" if it can."""
    held = heads_of(mine)
    first, end = parcels.first_head, parcels.first_head + parcels.num_heads
    if parcels.wire not in ("", *WIRES):
        return f"KV blocks travel as stored or as {' or '.join(WIRES)}, not as {parcels.wire!r}."
    if parcels.wire and mine.dtype not in CONVERTIBLE:
        return f"KV blocks in {mine.dtype} cannot travel as {parcels.wire}."
    if not 1 <= parcels.block_size <= MOST_TOKENS:
        return f"A parcel holds 1 to {MOST_TOKENS} tokens, not {parcels.block_size}."
    if parcels.num_heads < 1 or first < held.start or end > held.stop:
        return (
            f"KV heads {first} to {end - 1} were asked for; this rank holds {held.start} to "
            f"{held.stop - 1}."
        )
    nbytes = count * Packing(mine, parcels).nbytes(mine.dtype)
    if count > 1 and nbytes > MOST_BYTES:
        return f"Parcels of {nbytes} bytes were asked for at once; {MOST_BYTES} are allowed."
    return ""


@dataclass(frozen=True, slots=True)
class Packing:
    """Between the pool of a rank (its layout is `fingerprint`) and parcels."""

    fingerprint: LayoutFingerprint
    parcels: Parcels

    @property
    def heads(self) -> tuple[int, int]:
        """(first within the rank, count)."""
        first = self.parcels.first_head - heads_of(self.fingerprint).start
        return first, self.parcels.num_heads

    def nbytes(self, dtype: str) -> int:
        """Of one parcel out of a pool of `dtype`."""
        shape = self._shape
        if self.parcels.wire:
            return packed_nbytes(shape)
        return math.prod(shape) * int(getattr(torch, dtype).itemsize)

    @property
    def block_nbytes(self) -> int:
        """Of one block of the pool."""
        shape, dtype = layout_of(self.fingerprint).pool_shape(1), self.fingerprint.dtype
        return math.prod(shape) * int(getattr(torch, dtype).itemsize)

    @property
    def _shape(self) -> tuple[int, int, int, int, int]:
        own = self.fingerprint
        return (
            own.num_layers, 2, self.parcels.block_size, self.parcels.num_heads, own.head_dim
        )  # fmt: skip

    def tensor(self, blocks: torch.Tensor) -> torch.Tensor:
        """blocks: [N, bytes] uint8 → [N, L, 2, S, heads of the rank, D], the same memory."""
        shape = layout_of(self.fingerprint).pool_shape(blocks.shape[0])
        typed: torch.Tensor = blocks.view(getattr(torch, self.fingerprint.dtype))
        return typed.view(shape)

    def pack(
        self, blocks: torch.Tensor, block_ids: Sequence[int], wanted: Sequence[int]
    ) -> torch.Tensor:
        """The wanted parcels, [n, nbytes] uint8, where the pool is.

        blocks: the pool, [N, bytes] uint8; block_ids: the blocks of all tokens, in order; wanted:
        numbers of parcels, ascending. Rows beyond the last block are zero."""
        pool, size, own = self.tensor(blocks), self.parcels.block_size, self.fingerprint.block_size
        packed = []
        for first, count in runs(wanted, LONGEST):
            lead = next(lead for lead in range(own) if (first - lead) * size % own == 0)
            begin, end = (first - lead) * size // own, -(-(first + count) * size // own)
            ids = torch.tensor(block_ids[begin:end], dtype=torch.int64, device=blocks.device)
            gathered = gather_blocks(
                pool, ids, heads=self.heads, block_size=size, wire=self.parcels.wire or None
            )
            part = gathered[lead : lead + count].contiguous()
            packed.append(part.view(count, -1).view(torch.uint8))
        return torch.cat(packed)

    def unpack(
        self, packed: torch.Tensor, dtype: str, blocks: torch.Tensor, targets: Sequence[int]
    ) -> None:
        """Put parcels [n, nbytes] uint8 out of a pool of `dtype` into target blocks, no block
        twice. Heads that the parcels do not have keep their values."""
        pool = self.tensor(blocks)
        ids = torch.tensor(targets, dtype=torch.int64, device=blocks.device)
        packed = packed.to(blocks.device)
        if self.parcels.wire:
            scatter_blocks(packed, pool, ids, heads=self.heads, wire=self.parcels.wire)
            return
        typed = packed.view(getattr(torch, dtype)).view(len(targets), *self._shape)
        scatter_blocks(typed.to(pool.dtype), pool, ids, heads=self.heads)


class _Memory:
    """Bytes that are only read, shown so that torch does not warn of writing to them."""

    def __init__(self, data: Bytes) -> None:
        self._data = data  # kept as long as the array made of this
        self.__array_interface__ = {
            "version": 3,
            "shape": data.shape,
            "typestr": "|u1",
            "data": (data.ctypes.data, False),
        }


def blocks_in(data: Bytes, block_nbytes: int) -> torch.Tensor:
    """Host memory as [N, block_nbytes] uint8, without copying; not to be written if read-only."""
    return torch.from_numpy(np.asarray(_Memory(data))).view(-1, block_nbytes)


def blocks_of(pool: Pool) -> torch.Tensor:
    """A pool's memory as [N, bytes] uint8, where it lies."""
    if isinstance(pool, DeviceMemory):
        return pool.blocks
    return blocks_in(pool.read(0, pool.num_blocks), pool.block_nbytes)


def stream_of(pool: Pool) -> AbstractContextManager[None]:
    """What is launched inside runs beside the engine's work and is done at the end."""
    return pool.stream() if isinstance(pool, DeviceMemory) else nullcontext()
