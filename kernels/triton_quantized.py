"""Products with quantised weights in Triton; see `pdserve.kernels.quantized` for what is computed.

A program makes one tile of the result. It reads a tile of the weight as it is stored, turns it into
small whole numbers, which every activation dtype holds exactly, multiplies on the tensor cores, and
scales the float32 sums: once per group, or once at the end. For few rows the sum over K is split
among programs and a second kernel adds the pieces in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl

from pdserve.kernels.quantized import FEW, MANY
from pdserve.kernels.quantized_weight import QuantizedWeight

PROGRAMS = 264
"""Programs that a product of few rows should have: two for each multiprocessor of an H200. Fixed,
because it decides how sums are split."""
MOST_SPLITS = 16
COMBINE = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program makes (rows of x, width of outputs) and reads at once (columns)."""

    rows: int
    width: int
    columns: int
    splits: int
    warps: int
    stages: int


def tile_for(weight: QuantizedWeight, dtype: torch.dtype, *, many: bool) -> Tile:
    """By the weight's shape and packing alone, and whether there are many rows."""
    wide = dtype == torch.float32
    most = max(16, triton.next_power_of_2(min(weight.group, weight.columns)))
    if many:
        columns = min(32 if wide else 64, most)
        return Tile(64, 64 if wide else 128, columns, 1, 8, 2 if wide else 3)
    # A row of an AWQ matrix has half a byte per output: 128 of them make two sectors of memory.
    width = 128 if weight.packing == "awq" else 64
    columns = min(64 if wide else 128, most)
    tiles, blocks = triton.cdiv(weight.rows, width), triton.cdiv(weight.columns, columns)
    splits = max(1, min(MOST_SPLITS, blocks, PROGRAMS // tiles))
    return Tile(16, width, columns, splits, 4, 2 if wide else 4)


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, *, invariant: bool
) -> torch.Tensor:
    """See `pdserve.kernels.quantized_linear`."""
    rows, width = x.shape[0], weight.rows
    if rows >= MANY and not invariant:
        return functional.linear(x, dequantize(weight, x.dtype), bias)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile_for(weight, x.dtype, many=rows > FEW and not invariant)
    target = out
    if tile.splits > 1:
        target = torch.empty((tile.splits, rows, width), dtype=torch.float32, device=x.device)
    kind, values = _stored(weight)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.width), tile.splits)
    quantized_kernel[grid](
        x,
        weight.order,
        values,
        weight.zeros,
        weight.scales,
        bias,
        target,
        rows,
        weight.columns,
        width,
        x.stride(0),
        KIND=kind,
        GROUP=weight.group if weight.scales.shape[0] > 1 else 0,
        ZERO_OFFSET=weight.zero_offset,
        ORDERED=weight.order is not None,
        BIASED=bias is not None,
        ROWS=tile.rows,
        WIDTH=tile.width,
        COLUMNS=tile.columns,
        SPLITS=tile.splits,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.splits > 1:
        combine_splits_kernel[(triton.cdiv(rows * width, COMBINE),)](
            target,
            bias,
            out,
            rows * width,
            width,
            SPLITS=tile.splits,
            BIASED=bias is not None,
            BLOCK=COMBINE,
        )
    return out


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """See `pdserve.kernels.dequantize`."""
    rows, columns = weight.rows, weight.columns
    out = torch.empty((rows, columns), dtype=dtype, device=weight.values.device)
    tile = tile_for(weight, dtype, many=True)
    kind, values = _stored(weight)
    dequantize_kernel[(triton.cdiv(rows, tile.width), triton.cdiv(columns, tile.columns))](
        weight.order,
        values,
        weight.zeros,
        weight.scales,
        out,
        columns,
        rows,
        KIND=kind,
        GROUP=weight.group if weight.scales.shape[0] > 1 else 0,
        ZERO_OFFSET=weight.zero_offset,
        ORDERED=weight.order is not None,
        WIDTH=tile.width,
        COLUMNS=tile.columns,
        num_warps=4,
    )
    return out


def _stored(weight: QuantizedWeight) -> tuple[str, torch.Tensor]:
    """KIND and the values as the kernels read them: e4m3 as bytes, which every GPU has."""
    if weight.packing != "bytes":
        return weight.packing, weight.values
    if weight.values.dtype == torch.int8:
        return "int8", weight.values
    return "fp8", weight.values.view(torch.uint8)


@triton.jit
def biased(small, DTYPE: tl.constexpr):
    """A whole number from 0 to 15, plus a constant that puts it into the mantissa's lowest bits:
    differences of two are exact, and cost no conversion."""
    if DTYPE == tl.float16:
        number = (small | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + small
    elif DTYPE == tl.bfloat16:
        number = (small | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + small
    else:
        number = small.to(tl.float32)
    return number


@triton.jit
def byte_tile(value_ptr, n, k, columns, width, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """[COLUMNS, WIDTH] of a matrix of int8 or e4m3 bytes, the latter divided by 256."""
    offset = n.to(tl.int64)[:, None] * columns + k[None, :]
    mask = (n < width)[:, None] & (k < columns)[None, :]
    stored = tl.load(value_ptr + offset, mask=mask, other=0)
    if KIND == "int8":
        tile = stored.to(DTYPE)
    else:
        # Sign, four bits of exponent and three of mantissa, moved to where half precision has
        # them. Its bias is 15 and not 7: 256 times too small, subnormal numbers included.
        wide = stored.to(tl.int16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        tile = half.to(tl.float16, bitcast=True).to(DTYPE)
    return tl.trans(tile)


@triton.jit
def eightfold(words):
    """[A, B] → [A, 8 B], each word eight times in a row."""
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    return tl.interleave(words, words)


@triton.jit
def awq_place(n):
    """The lowest bit of output n in its word of an AWQ matrix."""
    lane = n % 8
    return ((lane >> 1) + (lane & 1) * 4) * 4


@triton.jit
def nibble_tile(
    value_ptr,
    zero_ptr,
    first_n,
    first_k,
    group,
    columns,
    width,
    KIND: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[COLUMNS, WIDTH] of a matrix of four bits, all in one group, the zero points taken off."""
    n = first_n + tl.arange(0, WIDTH)
    k = first_k + tl.arange(0, COLUMNS)
    zeros = tl.load(zero_ptr + group * (width // 8) + n // 8, mask=n < width, other=0)
    if KIND == "awq":
        word = first_n // 8 + tl.arange(0, WIDTH // 8)
        offset = k.to(tl.int64)[:, None] * (width // 8) + word[None, :]
        mask = (k < columns)[:, None] & (word < width // 8)[None, :]
        values = eightfold(tl.load(value_ptr + offset, mask=mask, other=0))
        values = (values >> awq_place(n)[None, :]) & 15
        zeros = zeros >> awq_place(n)
    else:
        word = first_k // 8 + tl.arange(0, COLUMNS // 8)
        offset = word.to(tl.int64)[None, :] * width + n[:, None]
        mask = (n < width)[:, None] & (word * 8 < columns)[None, :]
        values = eightfold(tl.load(value_ptr + offset, mask=mask, other=0))
        values = tl.trans((values >> ((k % 8) * 4)[None, :]) & 15)
        zeros = zeros >> ((n % 8) * 4)
    zeros = ((zeros & 15) + ZERO_OFFSET) & 15
    return biased(values, DTYPE) - biased(zeros, DTYPE)[None, :]


@triton.jit
def weight_tile(
    value_ptr,
    zero_ptr,
    first_n,
    first_k,
    columns,
    width,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[COLUMNS, WIDTH] of a matrix before scaling (e4m3 256 times too small), and their group."""
    group = first_k // GROUP if GROUP else 0
    if KIND == "int8" or KIND == "fp8":
        n = first_n + tl.arange(0, WIDTH)
        k = first_k + tl.arange(0, COLUMNS)
        tile = byte_tile(value_ptr, n, k, columns, width, KIND, DTYPE)
    else:
        tile = nibble_tile(
            value_ptr, zero_ptr, first_n, first_k, group, columns, width,
            KIND, ZERO_OFFSET, WIDTH, COLUMNS, DTYPE,
        )  # fmt: skip
    return tile, group


@triton.jit(do_not_specialize=["rows"])
def quantized_kernel(
    x_ptr,
    order_ptr,
    value_ptr,
    zero_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_row,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ORDERED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """ROWS × WIDTH of the result, or of one of SPLITS pieces of it. GROUP 0: one group for all."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_n = tl.program_id(1) * WIDTH
    n = first_n + tl.arange(0, WIDTH)
    split = tl.program_id(2)
    blocks = tl.cdiv(columns, COLUMNS)
    per_split = tl.cdiv(blocks, SPLITS)
    factor = 256.0 if KIND == "fp8" else 1.0
    acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        first_k = block * COLUMNS
        k = first_k + tl.arange(0, COLUMNS)
        source = k
        if ORDERED:
            source = tl.load(order_ptr + k, mask=k < columns, other=0)
        mask = (m < rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_row + source[None, :], mask=mask, other=0.0)
        tile, group = weight_tile(
            value_ptr, zero_ptr, first_n, first_k, columns, width,
            KIND, GROUP, ZERO_OFFSET, WIDTH, COLUMNS, dtype,
        )  # fmt: skip
        if GROUP:
            scale = tl.load(scale_ptr + group * width + n, mask=n < width, other=0.0)
            acc += tl.dot(x, tile, input_precision="ieee") * scale.to(tl.float32)[None, :]
        else:
            acc = tl.dot(x, tile, acc, input_precision="ieee")
    if GROUP:
        acc = acc * factor
    else:
        scale = tl.load(scale_ptr + n, mask=n < width, other=0.0).to(tl.float32)
        acc = acc * (scale * factor)[None, :]
    offset = m[:, None] * width + n[None, :]
    mask = (m < rows)[:, None] & (n < width)[None, :]
    if SPLITS == 1:
        if BIASED:
            bias = tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)
            acc = acc + bias[None, :]
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        piece = split.to(tl.int64) * rows * width
        tl.store(out_ptr + piece + offset, acc, mask=mask)


@triton.jit(do_not_specialize=["total"])
def combine_splits_kernel(
    piece_ptr,
    bias_ptr,
    out_ptr,
    total,
    width,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = Σ pieces, first to last, + bias."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < total
    acc = tl.load(piece_ptr + offset, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(piece_ptr + split * tl.cast(total, tl.int64) + offset, mask=mask, other=0.0)
    if BIASED:
        acc += tl.load(bias_ptr + offset % width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    order_ptr,
    value_ptr,
    zero_ptr,
    scale_ptr,
    out_ptr,
    columns,
    width,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ORDERED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """WIDTH rows and COLUMNS columns of the matrix [width, columns]."""
    first_n = tl.program_id(0) * WIDTH
    first_k = tl.program_id(1) * COLUMNS
    n = first_n + tl.arange(0, WIDTH)
    k = first_k + tl.arange(0, COLUMNS)
    tile, group = weight_tile(
        value_ptr, zero_ptr, first_n, first_k, columns, width,
        KIND, GROUP, ZERO_OFFSET, WIDTH, COLUMNS, tl.float32,
    )  # fmt: skip
    scale = tl.load(scale_ptr + group * width + n, mask=n < width, other=0.0).to(tl.float32)
    if KIND == "fp8":
        scale = scale * 256.0
    target = k
    if ORDERED:
        target = tl.load(order_ptr + k, mask=k < columns, other=0)
    offset = n.to(tl.int64)[None, :] * columns + target[:, None]
    mask = (n < width)[None, :] & (k < columns)[:, None]
    tl.store(out_ptr + offset, (tile * scale[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
