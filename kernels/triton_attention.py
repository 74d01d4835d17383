"""What attention of chunks and of single tokens share in Triton: a tile folded into one online
softmax (Milakov and Gimelshein 2018; Dao et al. 2022, arXiv:2205.14135); and the walk of single
tokens over tiles of the paged cache, which is bound by memory (of chunks: `triton_prefill`)."""

from __future__ import annotations

import triton
import triton.language as tl

from pdserve.kernels.triton_activation import tanh_of


@triton.jit
def scores_of(query, key, scale, soft_cap, CAPPED: tl.constexpr):
    """Scaled and capped scores, in units of ln 2 for exp2. float32 products are not rounded to
    tf32."""
    scores = tl.dot(query, key, input_precision="ieee")
    if CAPPED:
        scores = soft_cap * tanh_of(scores * scale / soft_cap) * 1.4426950408889634
    else:
        scores = scores * (scale * 1.4426950408889634)
    return scores


@triton.jit
def load_tile(
    base_ptr,
    table_ptr,
    table_entry,
    token,
    context,
    dim,
    cache_block,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
):
    """K or V of the tokens `token`, zero past the context: base_ptr is at the head and the kind.

    token and dim are a column and a row or the other way around, and so is the tile."""
    block = tl.load(table_ptr + (token // SIZE) * table_entry, mask=token < context, other=0)
    offset = block.to(tl.int64) * cache_block + (token % SIZE) * (KV_HEADS * DIM)
    return tl.load(base_ptr + offset + dim, mask=(token < context) & (dim < DIM), other=0.0)


@triton.jit
def fold_tile(acc, top, total, scores, visible, value, MASKED: tl.constexpr):
    """One step of the online softmax: the state with a tile of scores and values added."""
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet stays at -inf, which must not be subtracted from itself.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def fold_tiles(
    acc,
    top,
    total,
    query,
    position,
    base_ptr,
    table_ptr,
    table_entry,
    begin,
    end,
    limit,
    scale,
    soft_cap,
    cache_block,
    cache_kind,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The state (acc, top, total) with the tiles that start at begin, begin + KEYS, … < end added.

    K and V become what the query is, which for a cache of float8 is exact; its scales are not in
    here. Tokens from `limit` on are not read; base_ptr is at the head's K in block 0. A row sees
    keys up to its `position`, within the window, below the limit."""
    dim = tl.arange(0, DIM_PAD)
    step = tl.arange(0, KEYS).to(begin.dtype)
    for start in range(begin, end, KEYS):
        column = start + step
        key = load_tile(
            base_ptr,
            table_ptr,
            table_entry,
            column[None, :],
            limit,
            dim[:, None],
            cache_block,
            KV_HEADS,
            DIM,
            SIZE,
        ).to(query.dtype)
        value = load_tile(
            base_ptr + cache_kind,
            table_ptr,
            table_entry,
            column[:, None],
            limit,
            dim[None, :],
            cache_block,
            KV_HEADS,
            DIM,
            SIZE,
        ).to(query.dtype)
        visible = (column[None, :] <= position[:, None]) & (column < limit)[None, :]
        if WINDOW > 0:
            visible = visible & (position[:, None] - column[None, :] < WINDOW)
        scores = scores_of(query, key, scale, soft_cap, CAPPED)
        acc, top, total = fold_tile(acc, top, total, scores, visible, value, True)
    return acc, top, total
