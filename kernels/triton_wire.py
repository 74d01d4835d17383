"""Packed blocks out of a pool and into one, in one launch, in Triton; see `pdserve.kernels.wire`.

A program takes ROWS head vectors of one packed block: a vector's scale needs that vector alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import chosen
from pdserve.kernels.triton_float8 import to_e4m3
from pdserve.kernels.wire import LARGEST


def pack_blocks(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    *,
    heads: tuple[int, int] | None,
) -> None:
    """pool [N, L, 2, S, H, D] → data [n', L, 2, S', count, D], scales [n', L, 2, S', count]."""
    _launch(pool, block_ids, data, scales, heads, True)


def unpack_blocks(
    data: torch.Tensor,
    scales: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    heads: tuple[int, int] | None,
) -> None:
    """The inverse of `pack_blocks`."""
    _launch(pool, block_ids, data, scales, heads, False)


def _launch(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor,
    heads: tuple[int, int] | None,
    packs: bool,
) -> None:
    if data.numel() == 0:
        return
    _, layers, kinds, size, kv_heads, dim = pool.shape
    first, count = heads or (0, kv_heads)
    other = data.shape[3]
    dim_pad = triton.next_power_of_2(dim)
    config = chosen("pack_blocks" if packs else "unpack_blocks")
    rows = max(1, config["ELEMENTS"] // dim_pad)
    wire_kernel[(data.shape[0], triton.cdiv(layers * kinds * other * count, rows))](
        pool,
        data,
        scales,
        block_ids,
        block_ids.shape[0] * size,
        LOTS=layers * kinds,
        SIZE=size,
        OTHER=other,
        POOL_HEADS=kv_heads,
        FIRST=first,
        HEADS=count,
        DIM=dim,
        DIM_PAD=dim_pad,
        ROWS=rows,
        DATA_BLOCK=data.stride(0),
        SCALE_BLOCK=scales.stride(0),
        LARGEST=LARGEST[data.dtype],
        ROUNDS=data.dtype == torch.int8,
        PACKS=packs,
        num_warps=config["num_warps"],
    )


@triton.jit
def scale_of(x, LARGEST: tl.constexpr):
    """max|x| / LARGEST of each row; NaN where the row holds a NaN or an infinity."""
    size = tl.abs(x)
    largest = tl.max(tl.where(size == size, size, float("inf")), axis=1)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["id_ptr"])
def wire_kernel(
    pool_ptr,
    data_ptr,
    scale_ptr,
    id_ptr,
    tokens,
    LOTS: tl.constexpr,
    SIZE: tl.constexpr,
    OTHER: tl.constexpr,
    POOL_HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    DATA_BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """ROWS head vectors of the packed block pid 0, to or from where the pool holds them."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)[None, :]
    inside = row < LOTS * OTHER * HEADS
    token = block * OTHER + row // HEADS % OTHER
    there = inside & (token < tokens)  # the last block may have room for more tokens
    source = tl.load(id_ptr + token // SIZE, mask=there, other=0).to(tl.int64)
    place = (source * LOTS + row // (OTHER * HEADS)) * SIZE + token % SIZE
    in_pool = pool_ptr + ((place * POOL_HEADS + FIRST + row % HEADS) * DIM)[:, None] + dim
    in_data = data_ptr + (block * DATA_BLOCK + row * DIM)[:, None] + dim
    in_scales = scale_ptr + block * SCALE_BLOCK + row
    if PACKS:
        x = tl.load(in_pool, mask=there[:, None] & (dim < DIM), other=0.0).to(tl.float32)
        scale = scale_of(x, LARGEST)
        tl.store(in_scales, scale, mask=inside)
        used = (scale > 0)[:, None]
        ratio = tl.div_rn(x, tl.where(used, scale[:, None], 1.0) + tl.zeros_like(x))
        ratio = tl.where(used, tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST), 0.0)
        if ROUNDS:  # adding and taking away 3 · 2²² rounds to whole numbers, halves to even
            data = ((ratio + 12582912.0) - 12582912.0).to(tl.int8)
        else:
            data = to_e4m3(ratio)
        tl.store(in_data, data, mask=inside[:, None] & (dim < DIM))
    else:
        scale = tl.load(in_scales, mask=there, other=0.0)
        data = tl.load(in_data, mask=there[:, None] & (dim < DIM), other=0.0).to(tl.float32)
        x = (data * scale[:, None]).to(pool_ptr.dtype.element_ty)
        tl.store(in_pool, x, mask=there[:, None] & (dim < DIM))
