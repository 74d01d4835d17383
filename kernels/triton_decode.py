"""Attention of the newest tokens of each sequence, split over its keys, in Triton.

A sequence of n cached tokens is cut into pieces of `SPLIT` tokens, or longer ones once there would
be more than `MOST_SPLITS`: a function of n alone. Each piece is one program per KV head, which
leaves its unnormalised sum, its largest score and its total weight; a second kernel adds the pieces
up in their order. Nothing depends on the batch, so neither do the bits of the result. (The split is
that of Flash-Decoding, Dao et al. 2023.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import attention_class, chosen
from pdserve.kernels.triton_attention import fold_tiles

SPLIT = 256
"""Tokens per piece of a sequence, until there are MOST_SPLITS of them."""
MOST_SPLITS = 32


def attention_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `pdserve.kernels.attention_decode`."""
    shape = query.shape
    query = (query if query.dim() == 4 else query.unsqueeze(1)).contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out.view(shape)
    batch, queries, heads, dim = query.shape
    _, _, size, kv_heads, _ = cache.shape
    group = heads // kv_heads
    splits = _most_splits(block_table.shape[1] * size)
    pieces = torch.empty(
        (batch, queries, heads, splits, dim), dtype=torch.float32, device=query.device
    )
    tops = torch.empty((2, batch, queries, heads, splits), dtype=torch.float32, device=query.device)
    wide, classes = attention_class(query, cache)
    shared = {
        "QUERIES": queries,
        "HEADS": heads,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "WINDOW": window or 0,
        "SPLIT": SPLIT,
        "MOST_SPLITS": MOST_SPLITS,
    }
    decode_kernel[(splits, kv_heads, batch)](
        query,
        cache,
        pieces,
        tops,
        context_lens,
        block_table,
        tops.stride(0),
        splits,
        scale * k_scale,
        soft_cap or 0.0,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        block_table.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group * queries)),
        SIZE=size,
        CAPPED=soft_cap is not None,
        **chosen("attention_decode" + wide, *classes),
        **shared,
    )
    combine_kernel[(heads, queries, batch)](
        pieces,
        tops,
        out,
        context_lens,
        tops.stride(0),
        splits,
        v_scale,
        SPLITS_PAD=triton.next_power_of_2(MOST_SPLITS),
        num_warps=4,
        **shared,
    )
    return out.view(shape)


def _most_splits(room: int) -> int:
    """Pieces that a sequence of up to `room` tokens can have."""
    return max(1, min(MOST_SPLITS, triton.cdiv(room, SPLIT)))


@triton.jit
def pieces_of(context, SPLIT: tl.constexpr, MOST_SPLITS: tl.constexpr):
    """Tokens per piece: SPLIT, or as many times SPLIT as keep the pieces at MOST_SPLITS."""
    return tl.maximum(tl.cdiv(context, SPLIT * MOST_SPLITS), 1) * SPLIT


@triton.jit(
    do_not_specialize=["totals", "splits", "table_row"],
    do_not_specialize_on_alignment=["context_ptr", "table_ptr"],
)
def decode_kernel(
    query_ptr,
    cache_ptr,
    piece_ptr,
    top_ptr,
    context_ptr,
    table_ptr,
    totals,
    splits,
    scale,
    soft_cap,
    cache_block,
    cache_kind,
    table_row,
    table_entry,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Piece pid 0 of sequence pid 2, query heads of KV head pid 1; rows are (token, head)."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context = tl.load(context_ptr + sequence).to(tl.int32)
    per_piece = pieces_of(context, SPLIT, MOST_SPLITS)
    low = split * per_piece
    high = tl.minimum(low + per_piece, context)
    if low < high:
        row = tl.arange(0, ROWS)
        token = row // GROUP
        used = token < QUERIES
        query_row = (sequence * QUERIES + token) * HEADS + head * GROUP + row % GROUP
        dim = tl.arange(0, DIM_PAD)
        query = tl.load(
            query_ptr + query_row[:, None] * DIM + dim[None, :],
            mask=used[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        position = context - QUERIES + token
        base = cache_ptr + head * DIM
        table = table_ptr + sequence * table_row
        acc = tl.zeros([ROWS, DIM_PAD], dtype=tl.float32)
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        begin = low
        if WINDOW > 0:  # whole tiles before the window are skipped, whatever the pieces are
            begin = tl.maximum(low, (context - QUERIES - WINDOW + 1) // KEYS * KEYS)
        acc, top, total = fold_tiles(
            acc,
            top,
            total,
            query,
            position,
            base,
            table,
            table_entry,
            begin,
            high,
            high,
            scale,
            soft_cap,
            cache_block,
            cache_kind,
            KV_HEADS,
            DIM,
            DIM_PAD,
            SIZE,
            KEYS,
            WINDOW,
            CAPPED,
        )
        place = query_row * splits + split
        tl.store(
            piece_ptr + place[:, None] * DIM + dim[None, :],
            acc,
            mask=used[:, None] & (dim < DIM)[None, :],
        )
        tl.store(top_ptr + place, top, mask=used)
        tl.store(top_ptr + totals + place, total, mask=used)


@triton.jit(do_not_specialize=["totals", "splits"], do_not_specialize_on_alignment=["context_ptr"])
def combine_kernel(
    piece_ptr,
    top_ptr,
    out_ptr,
    context_ptr,
    totals,
    splits,
    v_scale,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """One head of one query: the pieces, each scaled to the largest score of all, over their total
    weight. A context of nothing gives zeros."""
    sequence = tl.program_id(2).to(tl.int64)
    row = (sequence * QUERIES + tl.program_id(1)) * HEADS + tl.program_id(0)
    context = tl.load(context_ptr + sequence).to(tl.int32)
    count = tl.cdiv(context, pieces_of(context, SPLIT, MOST_SPLITS))
    split = tl.arange(0, SPLITS_PAD)
    there = split < count
    dim = tl.arange(0, DIM_PAD)
    tops = tl.load(top_ptr + row * splits + split, mask=there, other=float("-inf"))
    weights = tl.load(top_ptr + totals + row * splits + split, mask=there, other=0.0)
    highest = tl.max(tops, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    shares = tl.exp2(tops - highest)
    pieces = tl.load(
        piece_ptr + (row * splits + split)[:, None] * DIM + dim[None, :],
        mask=there[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    total = tl.sum(weights * shares, axis=0)
    value = tl.sum(pieces * shares[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    value *= v_scale
    tl.store(out_ptr + row * DIM + dim, value.to(out_ptr.dtype.element_ty), mask=dim < DIM)
