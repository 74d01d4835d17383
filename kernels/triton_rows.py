"""Products of few rows, in Triton; see `pdserve.kernels.linear`.

With one row a product only reads its weight: what counts is how many bytes are on their way at a
time. A program takes a few rows of the weight and walks along them in steps of DEPTH elements, with
plain multiplications into one accumulator per element of a step, summed once at the end. That order
is the same for any number of rows, so a row has the same bits alone and beside three others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import chosen


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b for x [up to 4, columns], weight [rows, columns]; sums are float32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    rows, columns = x.shape[0], weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = dict(chosen("few_rows"))
    if rows > 2:  # an accumulator per row of x: half as many columns keep them in registers
        config["COLUMNS"] //= 2
    few_rows_kernel[(triton.cdiv(columns, config["COLUMNS"]),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        columns,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        BIASED=bias is not None,
        ROWS=rows,
        **config,
    )
    return out


@triton.jit
def few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    columns,
    width,
    x_row,
    weight_row,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """COLUMNS columns of x Wᵀ + b, for all ROWS rows of x; the weight is read once."""
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = column < columns
    place = tl.arange(0, DEPTH)
    weight_ptrs = weight_ptr + column[:, None] * weight_row + place[None, :]
    acc0 = tl.zeros([COLUMNS, DEPTH], dtype=tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for start in range(0, width, DEPTH):
        there = place < width - start
        weight = tl.load(
            weight_ptrs + start,
            mask=inside[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        acc0 += weight * part_of(x_ptr, 0, x_row, start + place, there)
        if ROWS > 1:
            acc1 += weight * part_of(x_ptr, 1, x_row, start + place, there)
        if ROWS > 2:
            acc2 += weight * part_of(x_ptr, 2, x_row, start + place, there)
        if ROWS > 3:
            acc3 += weight * part_of(x_ptr, 3, x_row, start + place, there)
    bias = tl.zeros([COLUMNS], dtype=tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        acc = acc0 if row == 0 else (acc1 if row == 1 else (acc2 if row == 2 else acc3))
        total = tl.sum(acc, axis=1) + bias
        tl.store(out_ptr + row * columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def part_of(x_ptr, row, x_row, place, there):
    """[1, DEPTH] elements of one row of x in float32."""
    return tl.load(x_ptr + row * x_row + place, mask=there, other=0.0).to(tl.float32)[None, :]
