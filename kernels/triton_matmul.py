"""Products whose rows do not know of one another, in Triton; see `pdserve.kernels.linear`.

One tile per dtype, whatever the number of rows, and one order of the sum: a row has the same bits
in any batch. That costs speed beside a library that chooses by the shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import chosen


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `pdserve.kernels.linear`, with `invariant`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    rows, columns = x.shape[0], weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile_of(x.dtype)
    linear_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["COLUMNS"]))](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        columns,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        BIASED=bias is not None,
        **tile,
    )
    return out


def tile_of(dtype: torch.dtype, operation: str = "linear") -> Mapping[str, int]:
    """Rows and columns of a program, elements of the sum per step, warps and stages: from the dtype
    (and the operation) alone, so that a row's bits are the same in any batch."""
    return chosen(operation + " wide" if dtype == torch.float32 else operation)


@triton.jit
def multiply_tiles(
    row_ptrs,
    row_there,
    weight_ptrs,
    column_there,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, COLUMNS] float32 products of the rows that begin at row_ptrs with those of a weight
    that begin at weight_ptrs, `width` elements each. float32 is not rounded to tf32."""
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    step = tl.arange(0, DEPTH)
    for start in range(0, width, DEPTH):
        place = start + step
        x = tl.load(
            row_ptrs[:, None] + place[None, :],
            mask=row_there[:, None] & (place < width)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptrs[None, :] + place[:, None],
            mask=column_there[None, :] & (place < width)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_row,
    weight_row,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of x Wᵀ + b. Neighbours share the weight's rows, which are read once from memory."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    acc = multiply_tiles(
        x_ptr + row * x_row,
        row < rows,
        weight_ptr + column * weight_row,
        column < columns,
        width,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    if BIASED:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )
