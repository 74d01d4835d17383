"""Copies of whole blocks between the pool and one contiguous buffer, in one launch, in Triton.

What is copied has no meaning here: both sides are seen as words of up to 4 bytes, and a thread
moves 16 bytes at a time where the rows allow it. See `pdserve.kernels.blocks` for the arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.block_geometry import geometry
from pdserve.kernels.configs import chosen

WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


def gather_blocks(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: tuple[int, int] | None = None,
) -> torch.Tensor:
    """See `pdserve.kernels.gather_blocks`; `out` tells the buffer's block size."""
    _launch(pool, out, block_ids, heads, True)
    return out


def scatter_blocks(
    buffer: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    heads: tuple[int, int] | None = None,
) -> None:
    """See `pdserve.kernels.scatter_blocks`."""
    _launch(pool, buffer, block_ids, heads, False)


def _launch(
    pool: torch.Tensor,
    buffer: torch.Tensor,
    block_ids: torch.Tensor,
    heads: tuple[int, int] | None,
    gathers: bool,
) -> None:
    if buffer.numel() == 0:
        return
    shape = geometry(pool, buffer, heads, tuple(WORDS))
    word = WORDS[shape.word_nbytes]
    words = shape.lots * shape.other * shape.taken
    config = chosen("gather_blocks" if gathers else "scatter_blocks")
    copy_blocks_kernel[(buffer.shape[0], triton.cdiv(words, config["TILE"]))](
        pool.view(-1).view(word),
        buffer.view(-1).view(word),
        block_ids,
        block_ids.shape[0] * shape.size,
        LOTS=shape.lots,
        SIZE=shape.size,
        OTHER=shape.other,
        WIDTH=shape.width,
        FIRST=shape.first,
        TAKEN=shape.taken,
        GATHERS=gathers,
        **config,
    )


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["id_ptr"])
def copy_blocks_kernel(
    pool_ptr,
    buffer_ptr,
    id_ptr,
    tokens,
    LOTS: tl.constexpr,
    SIZE: tl.constexpr,
    OTHER: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    TAKEN: tl.constexpr,
    TILE: tl.constexpr,
    GATHERS: tl.constexpr,
):
    """TILE words of the buffer's block pid 0, to or from where the pool holds their tokens."""
    block = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = word < LOTS * OTHER * TAKEN
    if SIZE == OTHER:
        there = inside
        source = tl.load(id_ptr + block).to(tl.int64)
        if WIDTH == TAKEN:
            offset = word
        else:
            offset = word // TAKEN * WIDTH + FIRST + word % TAKEN
    else:
        row = word // TAKEN
        token = block * OTHER + row % OTHER
        there = inside & (token < tokens)  # the last block may have room for more tokens
        source = tl.load(id_ptr + token // SIZE, mask=there, other=0).to(tl.int64)
        offset = (row // OTHER * SIZE + token % SIZE) * WIDTH + FIRST + word % TAKEN
    in_pool = pool_ptr + source * (LOTS * SIZE * WIDTH) + offset
    in_buffer = buffer_ptr + block * (LOTS * OTHER * TAKEN) + word
    if GATHERS:
        tl.store(in_buffer, tl.load(in_pool, mask=there, other=0), mask=inside)
    else:
        tl.store(in_pool, tl.load(in_buffer, mask=there, other=0), mask=there)
