"""Writing keys and values into the paged KV cache, and moving whole blocks.

Legend: T tokens, H KV heads, D head size, N blocks in the pool, S tokens per block. The cache of a
layer is a view [N, 2, S, H, D] of the pool (K at 0, V at 1); see `checks.cache_shape`.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks
from pdserve.kernels.rope import rope


def store_kv(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write K and V of T tokens: cache[slot // S, 0 or 1, slot % S] = key or value.

    key, value: [T, H, D] in the cache's dtype; cache: [N, 2, S, H, D]; slots: [T] int64, each
    below N · S, no slot twice.
    """
    _, size, heads, dim = checks.cache_shape(cache)
    checks.shape("key", key, [None, heads, dim])
    checks.shape("value", value, key.shape)
    checks.shape("slots", slots, [key.shape[0]])
    checks.dtype("slots", slots, (torch.int64,))
    checks.same_dtype("key", key, "cache", cache)
    checks.same_dtype("value", value, "cache", cache)
    blocks, offsets = slots // size, slots % size
    cache[:, 0].index_put_((blocks, offsets), key)
    cache[:, 1].index_put_((blocks, offsets), value)


def rope_and_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Turn query and key (`rope`), write key and value (`store_kv`), return the turned query.

    query: [T, Hq, D]; key, value: [T, H, D]; cos, sin: [T, D / 2] float32; slots: [T] int64.
    """
    store_kv(rope(key, cos, sin), value, cache, slots)
    return rope(query, cos, sin)


def gather_blocks(
    pool: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy blocks, all layers at once, into one contiguous buffer: out[i] = pool[block_ids[i]].

    pool: [N, ...], each block contiguous; block_ids: [n], int32 or int64; out: [n, ...].
    """
    checks.shape("block_ids", block_ids, [None])
    checks.dtype("block_ids", block_ids, checks.INDICES)
    if out is not None:
        checks.shape("out", out, [block_ids.shape[0], *pool.shape[1:]])
        checks.same_dtype("out", out, "pool", pool)
        return torch.index_select(pool, 0, block_ids, out=out)
    return pool.index_select(0, block_ids)


def scatter_blocks(buffer: torch.Tensor, pool: torch.Tensor, block_ids: torch.Tensor) -> None:
    """The inverse of `gather_blocks`: pool[block_ids[i]] = buffer[i]; no block twice.

    buffer: [n, ...]; pool: [N, ...]; block_ids: [n], int32 or int64.
    """
    checks.shape("block_ids", block_ids, [None])
    checks.dtype("block_ids", block_ids, checks.INDICES)
    checks.shape("buffer", buffer, [block_ids.shape[0], *pool.shape[1:]])
    checks.same_dtype("buffer", buffer, "pool", pool)
    pool.index_copy_(0, block_ids.long(), buffer)
