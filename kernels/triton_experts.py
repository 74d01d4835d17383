"""Mixtures of experts in Triton; see `pdserve.kernels.experts`.

Nothing asks the host: pairs (token, expert) are sorted by expert, and a program finds the expert of
its tile by bisection, so there are as many programs as the worst split would need and those without
a tile return. The matrices stay where they were loaded: a program reads from a table where its
expert's begin. Tiles depend on the dtype alone, sums on their own row: a token has the same bits
in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.experts import ExpertWeights
from pdserve.kernels.triton_activation import KINDS, activated
from pdserve.kernels.triton_matmul import multiply_tiles, tile_of
from pdserve.kernels.triton_prefill import sequence_of

COMBINE_BLOCK = 1024


def route(
    logits: torch.Tensor, active: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pdserve.kernels.route`. Of equal experts the first one is taken."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens, count = logits.shape
    weights = torch.empty((tokens, active), dtype=logits.dtype, device=logits.device)
    experts = torch.empty((tokens, active), dtype=torch.int64, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            weights,
            experts,
            count,
            logits.stride(0),
            COUNT_PAD=triton.next_power_of_2(count),
            ACTIVE=active,
            ACTIVE_PAD=triton.next_power_of_2(active),
            RENORMALISE=renormalise,
            num_warps=1 if count <= 256 else 4,
        )
    return weights, experts


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    matrices: ExpertWeights,
    activation: str,
) -> torch.Tensor:
    """See `pdserve.kernels.mixture`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # A token's experts in the order of their numbers: that of its sum.
    experts, place = experts.sort(dim=1)
    weights = weights.gather(1, place)
    grouped, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(matrices.count + 1, device=x.device)
    offsets = torch.searchsorted(grouped, bounds)
    pairs, hidden, inner = grouped.shape[0], matrices.hidden_size, matrices.inner_size
    made = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    tile = tile_of(x.dtype, "mixture")
    for source, target, columns, width, kind in (
        (x, made, inner, hidden, KINDS[activation]),
        (made, parts, hidden, inner, ""),
    ):
        # Expert e begins at tile offsets[e] // ROWS + e at the latest.
        tiles = pairs // tile["ROWS"] + matrices.count
        grouped_kernel[(tiles, triton.cdiv(columns, tile["COLUMNS"]))](
            source,
            target,
            matrices.pointers,
            order,
            offsets,
            matrices.count,
            experts.shape[1],
            columns,
            width,
            source.stride(0),
            KIND=kind,
            **tile,
        )
    combine_kernel[(x.shape[0], triton.cdiv(hidden, COMBINE_BLOCK))](
        parts,
        weights,
        out,
        hidden,
        ACTIVE=experts.shape[1],
        BLOCK=COMBINE_BLOCK,
    )
    return out


@triton.jit
def route_kernel(
    logit_ptr,
    weight_ptr,
    expert_ptr,
    count,
    logit_row,
    COUNT_PAD: tl.constexpr,
    ACTIVE: tl.constexpr,
    ACTIVE_PAD: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    """One token: softmax over all experts, then the largest, ACTIVE times."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, COUNT_PAD)
    logits = tl.load(
        logit_ptr + token * logit_row + expert, mask=expert < count, other=float("-inf")
    ).to(tl.float32)
    grown = tl.exp(logits - tl.max(logits, axis=0))
    chances = tl.where(expert < count, grown / tl.sum(grown, axis=0), -1.0)
    place = tl.arange(0, ACTIVE_PAD)
    weights = tl.zeros([ACTIVE_PAD], dtype=tl.float32)
    chosen = tl.zeros([ACTIVE_PAD], dtype=tl.int32)
    for turn in range(ACTIVE):
        best = tl.max(chances, axis=0)
        found = tl.min(tl.where(chances == best, expert, COUNT_PAD), axis=0)
        found = tl.minimum(found, count - 1)  # a NaN equals nothing: some expert that exists
        weights = tl.where(place == turn, best, weights)
        chosen = tl.where(place == turn, found, chosen)
        chances = tl.where(expert == found, -1.0, chances)
    if RENORMALISE:
        weights = weights / tl.sum(weights, axis=0)
    there = place < ACTIVE
    target = token * ACTIVE + place
    tl.store(weight_ptr + target, weights.to(weight_ptr.dtype.element_ty), mask=there)
    tl.store(expert_ptr + target, chosen.to(tl.int64), mask=there)


@triton.jit
def weight_rows(matrix_ptr, which, column, width, dtype: tl.constexpr):
    """Where the rows `column` of the matrix that begins at matrix_ptr[which] lie."""
    base = tl.load(matrix_ptr + which).to(tl.pointer_type(dtype))
    return tl.multiple_of(base, 16) + column * width


@triton.jit(do_not_specialize=["experts", "active"])
def grouped_kernel(
    source_ptr,
    target_ptr,
    matrix_ptr,
    order_ptr,
    offset_ptr,
    experts,
    active,
    columns,
    width,
    source_row,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of one expert's pairs. KIND, an activation: rows of tokens times gate and up, put
    down in the order of the experts; "": those rows times down, put down in the pairs' order."""
    tile = tl.program_id(0)
    expert = sequence_of(offset_ptr, experts, tile, ROWS)
    begin = tl.load(offset_ptr + expert)
    end = tl.load(offset_ptr + expert + 1)
    first = begin + ((tile - expert).to(tl.int64) - begin // ROWS) * ROWS
    if first < end:
        place = first + tl.arange(0, ROWS)
        there = place < end
        pair = tl.load(order_ptr + place, mask=there, other=0)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        in_width = column < columns
        dtype: tl.constexpr = source_ptr.dtype.element_ty
        if KIND != "":
            rows = source_ptr + (pair // active) * source_row
            gate_rows = weight_rows(matrix_ptr, expert, column, width, dtype)
            up_rows = weight_rows(matrix_ptr, experts + expert, column, width, dtype)
            gate = multiply_tiles(rows, there, gate_rows, in_width, width, ROWS, COLUMNS, DEPTH)
            up = multiply_tiles(rows, there, up_rows, in_width, width, ROWS, COLUMNS, DEPTH)
            result = activated(gate, KIND) * up
            target = place
        else:
            rows = source_ptr + place * source_row
            down_rows = weight_rows(matrix_ptr, 2 * experts + expert, column, width, dtype)
            result = multiply_tiles(rows, there, down_rows, in_width, width, ROWS, COLUMNS, DEPTH)
            target = pair
        tl.store(
            target_ptr + target[:, None] * columns + column[None, :],
            result.to(target_ptr.dtype.element_ty),
            mask=there[:, None] & in_width[None, :],
        )


@triton.jit
def combine_kernel(
    part_ptr, weight_ptr, out_ptr, hidden, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """One token, BLOCK columns: the weighted sum of its experts' results in float32, one by one."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(ACTIVE):
        pair = token * ACTIVE + turn
        weight = tl.load(weight_ptr + pair).to(tl.float32)
        part = tl.load(part_ptr + pair * hidden + column, mask=column < hidden, other=0.0)
        acc += weight * part.to(tl.float32)
    tl.store(
        out_ptr + token * hidden + column, acc.to(out_ptr.dtype.element_ty), mask=column < hidden
    )
