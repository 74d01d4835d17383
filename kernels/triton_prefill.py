"""Attention of ragged chunks over the paged cache, in Triton; see `pdserve.kernels.attention`.

A program computes ROWS = TOKENS · group query rows of one sequence and one KV head: the query heads
that share a KV head stand beside one another, so each tile of K and V is read once for all of them.
The softmax is the online one (Milakov and Gimelshein 2018; Dao et al. 2022, arXiv:2205.14135).

On Hopper the products of a program wait for its softmax and the other way around; what keeps the
tensor cores busy meanwhile is a second program on the same multiprocessor, for which the first
configurations leave half of the registers (`maxnreg`; bench/LOG.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import attention_class, chosen
from pdserve.kernels.triton_attention import fold_tile, scores_of


def attention_prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    invariant: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `pdserve.kernels.attention_prefill`. The lengths stay on the device: that a sequence has
    at least as many cached tokens as queries is not checked here."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    tokens, heads, dim = query.shape
    _, _, size, kv_heads, _ = cache.shape
    group, batch = heads // kv_heads, context_lens.shape[0]
    wide, shape = attention_class(query, cache)
    tile = dict(chosen("attention_prefill" + wide, *shape))
    rows = max(tile.pop("ROWS"), triton.next_power_of_2(group))
    per_tile = rows // triton.next_power_of_2(group)
    # Sequence b begins at tile query_start[b] // per_tile + b at the latest: room for everyone's
    # last, half-full tile without knowing the lengths.
    prefill_kernel[(tokens // per_tile + batch, kv_heads)](
        query,
        cache,
        out,
        query_start,
        context_lens,
        block_table,
        batch,
        scale * k_scale,
        soft_cap or 0.0,
        v_scale,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        block_table.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        DIM=dim,
        DIM_PAD=max(16, triton.next_power_of_2(dim)),
        SIZE=size,
        TOKENS=per_tile,
        ROWS=rows,
        WINDOW=window or 0,
        CAPPED=soft_cap is not None,
        UNIFORM=invariant,
        **tile,
    )
    return out


@triton.jit
def sequence_of(query_start_ptr, batch, tile, TOKENS: tl.constexpr):
    """The sequence that `tile` belongs to: the last b with query_start[b] // TOKENS + b ≤ tile."""
    low = 0
    high = batch
    while low < high:
        middle = (low + high) // 2
        begin = tl.load(query_start_ptr + middle).to(tl.int32) // TOKENS + middle
        if begin <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def fold_keys(
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
    context,
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
    MASKED: tl.constexpr,
):
    """As `triton_attention.fold_tiles`, for many rows: where a token lies is looked up once for its
    K and V, and of what every row sees nothing is masked but the head's padding."""
    dim = tl.arange(0, DIM_PAD)
    step = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        column = start + step
        there = (dim < DIM)[None, :]
        if MASKED:
            entry_ptr = table_ptr + (column // SIZE) * table_entry
            block = tl.load(entry_ptr, mask=column < context, other=0)
            there = there & (column < context)[:, None]
        else:
            block = tl.load(table_ptr + (column // SIZE) * table_entry)
        place = block.to(tl.int64) * cache_block + (column % SIZE) * (KV_HEADS * DIM)
        key_ptr = base_ptr + place[:, None] + dim[None, :]
        if MASKED or DIM < DIM_PAD:  # a mask that is always true costs, too
            key = tl.load(key_ptr, mask=there, other=0.0).to(query.dtype)
            value = tl.load(key_ptr + cache_kind, mask=there, other=0.0).to(query.dtype)
        else:
            key = tl.load(key_ptr).to(query.dtype)
            value = tl.load(key_ptr + cache_kind).to(query.dtype)
        if MASKED or CAPPED:
            visible = (column[None, :] <= position[:, None]) & (column < context)[None, :]
            if WINDOW > 0:
                visible = visible & (position[:, None] - column[None, :] < WINDOW)
            scores = scores_of(query, tl.trans(key), scale, soft_cap, CAPPED)
            acc, top, total = fold_tile(acc, top, total, scores, visible, value, MASKED)
        else:
            acc, top, total = fold_seen(acc, top, total, query, key, value, scale)
    return acc, top, total


@triton.jit
def fold_seen(acc, top, total, query, key, value, scale):
    """`triton_attention.fold_tile` of a tile that every row sees: scaling and subtracting are one
    operation, and there is always a largest score."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    in_twos = scale * 1.4426950408889634
    new_top = tl.maximum(top, tl.max(scores, axis=1) * in_twos)
    weights = tl.exp2(scores * in_twos - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit(
    do_not_specialize=["batch", "table_row"],
    do_not_specialize_on_alignment=["query_start_ptr", "context_ptr", "table_ptr"],
)
def prefill_kernel(
    query_ptr,
    cache_ptr,
    out_ptr,
    query_start_ptr,
    context_ptr,
    table_ptr,
    batch,
    scale,
    soft_cap,
    v_scale,
    query_token,
    query_head,
    cache_block,
    cache_kind,
    table_row,
    table_entry,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """TOKENS queries of one sequence, all heads of one KV head: rows are (token, head) pairs.

    UNIFORM: every tile is masked. Then a row's bits do not depend on its chunk: tiles that it does
    not see add exact zeros, but the compiler may fuse other operations where nothing is masked."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a prompt first
    head = tl.program_id(1).to(tl.int64)
    sequence = sequence_of(query_start_ptr, batch, tile, TOKENS)
    begin = tl.load(query_start_ptr + sequence).to(tl.int64)
    length = tl.load(query_start_ptr + sequence + 1).to(tl.int64) - begin
    first = ((tile - sequence).to(tl.int64) - begin // TOKENS) * TOKENS
    if first < length:
        context = tl.load(context_ptr + sequence).to(tl.int32)
        row = tl.arange(0, ROWS)
        token = first + row // GROUP_PAD
        in_group = row % GROUP_PAD
        used = (token < length) & (in_group < GROUP)
        dim = tl.arange(0, DIM_PAD)
        query_head_id = head * GROUP + in_group
        query = tl.load(
            query_ptr
            + ((begin + token) * query_token + query_head_id * query_head)[:, None]
            + dim[None, :],
            mask=used[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        position = (context - length + token).to(tl.int32)
        base = cache_ptr + head * DIM
        table = table_ptr + sequence.to(tl.int64) * table_row
        acc = tl.zeros([ROWS, DIM_PAD], dtype=tl.float32)
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        # Keys [low, clear) are seen by every row, those up to `newest` only by some.
        oldest = (context - length + first).to(tl.int32)
        newest = tl.minimum(oldest + TOKENS, context)
        low = tl.zeros_like(oldest)
        clear = (oldest + 1) // KEYS * KEYS
        if WINDOW > 0:
            low = tl.maximum(oldest - WINDOW + 1, 0) // KEYS * KEYS
            clear = low
        if UNIFORM:
            clear = low
        for last in tl.static_range(2):  # the tiles that every row sees, then the others
            acc, top, total = fold_keys(
                acc,
                top,
                total,
                query,
                position,
                base,
                table,
                table_entry,
                clear if last else low,
                newest if last else clear,
                context,
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
                last == 1,
            )
        result = acc / tl.where(total > 0, total, 1.0)[:, None] * v_scale
        tl.store(
            out_ptr + (((begin + token) * HEADS + query_head_id) * DIM)[:, None] + dim[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=used[:, None] & (dim < DIM)[None, :],
        )
