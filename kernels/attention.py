"""Attention over the paged KV cache.

Legend: T query tokens of all sequences, B sequences, Hq query heads, H KV heads, D head size,
N blocks in the pool, S tokens per block, M blocks per row of the block table. Query head h reads
KV head h // (Hq / H). Token t of a sequence lies in block block_table[b, t // S] at offset t % S.
scale is above 0.

For a query at position i of its sequence, over the keys j that it sees:

    out = Σ_j softmax_j(cap(scale · q·k_j)) v_j,   j ≤ i and, with a window, i - j < window,
    cap(s) = soft_cap · tanh(s / soft_cap), or s without one.

A cache of float8_e4m3fn holds k / k_scale and v / v_scale (see `pdserve.kernels.cache`). Its
numbers are read as the query's dtype, which is exact; k_scale goes into `scale`, and the sum is
multiplied by v_scale. Other caches have the query's dtype and scales of 1.

Scores and the softmax are float32 whatever the dtype. Sequences are computed one by one, so a
sequence's result depends on its own data and its own split into queries, never on the batch; with
`invariant`, not on the split either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, dispatch, native

TILE = 256
"""Queries per tile of a chunk that needs a mask: bounds the mask to TILE × context."""
LARGEST_HEAD = 256
"""Of the Triton kernels: beyond it a tile does not fit into shared memory."""


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
    """Causal attention of a ragged batch of chunks, each over everything cached before it too.

    query: [T, Hq, D]; cache: [N, 2, S, H, D], the chunks' own K and V already stored.
    query_start: [B + 1], sequence b's queries are rows query_start[b] .. query_start[b + 1] - 1;
    context_lens: [B], tokens of b in the cache, this chunk included: its queries are the last
    ones; block_table: [B, M]. The three are int32 or int64. Returns [T, Hq, D].

    invariant: a query has the same bits in whatever chunk it comes, alone too, and a sequence with
    one query and a context of 0 is padding, which comes out as zeros. The CPU then computes token
    by token, which is slow for long prompts.
    """
    _check(query, cache, context_lens, block_table, scale, window, soft_cap)
    checks.cache_dtype("query", query, cache, k_scale, v_scale)
    checks.shape("query_start", query_start, [context_lens.shape[0] + 1])
    checks.dtype("query_start", query_start, checks.INDICES)
    checks.same_device("query_start", query_start, "query", query)
    fast = dispatch.implementation("attention_prefill", query, cache)
    if fast is not None:
        _check_head("attention_prefill", query)
        result: torch.Tensor = fast(
            query,
            cache,
            query_start,
            context_lens,
            block_table,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            invariant=invariant,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return result
    if invariant:
        lengths = query_start.diff()
        rows = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)
        place = torch.arange(query.shape[0], device=query.device) - query_start[1:][rows]
        return attention_decode(
            query,
            cache,
            (context_lens[rows] + place + 1).clamp_(min=0),
            block_table[rows],
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    if soft_cap is None and native.prefills(query, cache):
        _check_lengths(query_start.diff().tolist(), context_lens.tolist())
        return native.attention_prefill(
            query, cache, query_start, context_lens, block_table, scale=scale, window=window
        )
    out = _prefill(
        query, cache, query_start, context_lens, block_table, scale * k_scale, window, soft_cap
    )
    return out if v_scale == 1.0 else out.mul_(v_scale)


def _prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    out = torch.empty_like(query)
    starts, lens = query_start.tolist(), context_lens.tolist()
    _check_lengths(query_start.diff().tolist(), lens)
    for row, length in enumerate(lens):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        key, value = _gather(cache, block_table[row], 0, length, query.dtype)
        out[first:last] = _chunk(query[first:last], key, value, scale, window, soft_cap)
    return out


def _check_lengths(queries: Sequence[int], context_lens: Sequence[int]) -> None:
    for row, (count, length) in enumerate(zip(queries, context_lens, strict=True)):
        if count > length:
            raise checks.KernelError(
                f"Sequence {row} has {count} queries but a context of only {length} tokens."
            )


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
    """Attention of the newest token of each sequence, or of its newest few.

    query: [B, Hq, D], or [B, Q, Hq, D] for the Q newest tokens; cache: [N, 2, S, H, D] with the
    tokens' K and V stored; context_lens: [B], at least Q, the queries' own tokens included, or 0
    for a row of padding, which comes out as zeros; block_table: [B, M]. Returns the query's shape.
    A sequence's result has the same bits alone and in any batch.
    """
    rows = query.flatten(0, 1) if query.dim() == 4 else query
    _check(rows, cache, context_lens, block_table, scale, window, soft_cap)
    checks.cache_dtype("query", query, cache, k_scale, v_scale)
    checks.shape("query", query, [context_lens.shape[0], *[None] * (query.dim() - 1)])
    fast = dispatch.implementation("attention_decode", query, cache)
    if fast is not None:
        _check_head("attention_decode", query)
        attended: torch.Tensor = fast(
            query,
            cache,
            context_lens,
            block_table,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return attended
    if cache.dtype == query.dtype and native.attends(query, cache):
        return native.attention_decode(
            query,
            cache,
            context_lens,
            block_table,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
    out = _decode(query, cache, context_lens, block_table, scale * k_scale, window, soft_cap)
    return out if v_scale == 1.0 else out.mul_(v_scale)


def _decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    if query.dim() == 4:
        few = torch.empty_like(query)
        for row, length in enumerate(context_lens.tolist()):
            key, value = _gather(cache, block_table[row], 0, length, query.dtype)
            few[row] = _chunk(query[row], key, value, scale, window, soft_cap) if length else 0
        return few
    heads, dim = cache.shape[3:]
    out = torch.empty_like(query)
    # The queries that share a KV head become the "sequence" of one unmasked product.
    grouped = query.view(-1, heads, query.shape[1] // heads, dim)
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            out[row] = 0
            continue
        begin = 0 if window is None else max(0, length - window)
        key, value = _gather(cache, block_table[row], begin, length, query.dtype)
        if soft_cap is None:
            result = functional.scaled_dot_product_attention(
                grouped[row : row + 1], key.unsqueeze(0), value.unsqueeze(0), scale=scale
            )
        else:
            result = _explicit(grouped[row], key, value, scale, None, soft_cap)
        out[row] = result.reshape(-1, dim)  # torch's kernels lay it out in several ways
    return out


def _gather(
    cache: torch.Tensor, table: torch.Tensor, begin: int, end: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens [begin, end) of one sequence in `dtype`: each [H, end - begin, D], a
    strided view of a copy of the blocks."""
    size = cache.shape[2]
    skipped = begin // size
    blocks = table[skipped : -(-end // size)]
    if blocks.shape[0] * size < end - skipped * size:
        raise checks.KernelError(
            f"block_table has room for {table.shape[0] * size} tokens, the context has {end}."
        )
    begin, end = begin - skipped * size, end - skipped * size
    # torch selects bytes but not float8: the same numbers either way.
    plain = cache.view(torch.uint8) if cache.dtype == checks.FLOAT8 else cache
    key, value = (plain[:, kind].index_select(0, blocks).flatten(0, 1) for kind in (0, 1))
    key, value = (part[begin:end].view(cache.dtype).to(dtype) for part in (key, value))
    return key.transpose(0, 1), value.transpose(0, 1)


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """The last L of C positions: query [L, Hq, D], key and value [H, C, D]; returns [L, Hq, D]."""
    length, context = query.shape[0], key.shape[1]
    if length == context and soft_cap is None and (window is None or window >= context):
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return result[0].transpose(0, 1)
    out = torch.empty_like(query)
    for first in range(0, length, TILE):
        last = min(first + TILE, length)
        end = context - length + last
        begin = 0 if window is None else max(0, context - length + first - window + 1)
        keys, values = key[:, begin:end], value[:, begin:end]
        mask = _mask(last - first, end - begin, window, query.device)
        rows = query[first:last].transpose(0, 1)
        if soft_cap is None:
            result = functional.scaled_dot_product_attention(
                rows.unsqueeze(0),
                keys.unsqueeze(0),
                values.unsqueeze(0),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0]
        else:
            grouped = rows.unflatten(0, (key.shape[0], -1)).flatten(1, 2)
            repeated = mask.repeat(rows.shape[0] // key.shape[0], 1)
            result = _explicit(grouped, keys, values, scale, repeated, soft_cap).reshape(rows.shape)
        out[first:last] = result.transpose(0, 1)
    return out


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys] bool, true where visible; the last query stands at the last key."""
    position = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    distance = position - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    soft_cap: float,
) -> torch.Tensor:
    """The formula as it stands, with a soft cap: query [H, R, D], key and value [H, C, D]."""
    scores = torch.matmul(query.float(), key.float().transpose(1, 2)) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), value.float()).to(query.dtype)


def _check_head(operation: str, query: torch.Tensor) -> None:
    if query.shape[-1] > LARGEST_HEAD:
        raise checks.KernelError(
            f"The Triton kernel of {operation} takes heads of up to {LARGEST_HEAD}, not of "
            f"{query.shape[-1]}: set {dispatch.ENVIRONMENT}={operation}=reference."
        )


def _check(
    query: torch.Tensor,
    cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    _, _, heads, dim = checks.cache_shape(cache)
    checks.shape("query", query, [None, None, dim])
    checks.dtype("query", query, checks.FLOATS)
    checks.shape("context_lens", context_lens, [None])
    checks.shape("block_table", block_table, [context_lens.shape[0], None])
    for name, tensor in (("context_lens", context_lens), ("block_table", block_table)):
        checks.dtype(name, tensor, checks.INDICES)
        checks.same_device(name, tensor, "query", query)
    checks.same_device("cache", cache, "query", query)
    if query.shape[1] % heads:
        raise checks.KernelError(
            f"The {query.shape[1]} query heads must be a multiple of the {heads} KV heads."
        )
    if not scale > 0:
        raise checks.KernelError(f"scale must be above 0, not {scale}.")
    if window is not None and window < 1:
        raise checks.KernelError(f"window must be at least 1, or None for no window, not {window}.")
    if soft_cap is not None and soft_cap <= 0:
        raise checks.KernelError(f"soft_cap must be above 0, or None for no cap, not {soft_cap}.")
