"""RMS norm in Triton; see `pdserve.kernels.norm` for the formulas. One program per few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
"""Elements per program: narrow rows (heads) share one."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `pdserve.kernels.rms_norm`. The first dimensions may lie anyhow: two of them are
    addressed by strides, more than two are copied together first."""
    source = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]).transpose(0, 1)
    if source.dim() != 3 or source.stride(-1) != 1:
        source = source.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(source, None, weight, out, None, eps)
    return out


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pdserve.kernels.fused_add_rms_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x.view(-1, 1, x.shape[-1]), residual, weight, out, total, eps)
    return out, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
) -> None:
    """x: [A, B, D] with any distances between rows; the others contiguous, A · B rows."""
    outer, inner, width = x.shape
    rows = outer * inner
    if rows == 0 or width == 0:
        return
    block = triton.next_power_of_2(width)
    # From the width alone: how a row is spread over threads decides the order of its sum.
    at_once = max(1, TILE // block)
    rms_norm_kernel[(triton.cdiv(rows, at_once),)](
        x,
        residual if residual is not None else x,
        weight,
        out,
        total if total is not None else out,
        rows,
        inner,
        x.stride(0),
        x.stride(1) if inner > 1 else 0,  # else it is the batch's, whose divisors must not matter
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=at_once,
        ADDS=residual is not None,
        num_warps=max(1, min(16, block * at_once // 512)),
    )


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    inner,
    stride_outer,
    stride_inner,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Rows [pid · ROWS, …): out = norm(x [+ residual, rounded]) · weight."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < WIDTH)
    source = (row // inner) * stride_outer + (row % inner) * stride_inner + column
    target = row * WIDTH + column
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    if ADDS:
        added = x.to(tl.float32) + tl.load(residual_ptr + target, mask=mask, other=0.0)
        x = added.to(x_ptr.dtype.element_ty)  # the sum is rounded before it is normed
        tl.store(total_ptr + target, x, mask=mask)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1)[:, None] / WIDTH
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = wide * (1.0 / tl.sqrt_rn(mean + eps)) * weight
    tl.store(out_ptr + target, y.to(out_ptr.dtype.element_ty), mask=mask)
