"""Writing keys and values into the paged KV cache.

Legend: T tokens, H KV heads, D head size, N blocks in the pool, S tokens per block. The cache of a
layer is a view [N, 2, S, H, D] of the pool (K at 0, V at 1); see `checks.cache_shape`.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch
from pdserve.kernels.rope import check_rope, rope


def store_kv(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write K and V of T tokens: cache[slot // S, 0 or 1, slot % S] = key or value.

    key, value: [T, H, D] in the cache's dtype; cache: [N, 2, S, H, D]; slots: [T] int64, each
    below N · S, no slot twice. Tokens whose slot is negative are padding and not written.
    """
    _check_store(key, value, cache, slots)
    fast = dispatch.implementation("store_kv", key)
    if fast is not None:
        fast(key, value, cache, slots)
        return
    size = cache.shape[2]
    if slots.numel() and int(slots.min()) < 0:
        real = slots >= 0
        key, value, slots = key[real], value[real], slots[real]
    blocks, offsets = slots // size, slots % size
    cache[:, 0].index_put_((blocks, offsets), key)
    cache[:, 1].index_put_((blocks, offsets), value)


def _check_store(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    _, _, heads, dim = checks.cache_shape(cache)
    checks.shape("key", key, [None, heads, dim])
    checks.shape("value", value, key.shape)
    checks.shape("slots", slots, [key.shape[0]])
    checks.dtype("slots", slots, (torch.int64,))
    checks.same_dtype("key", key, "cache", cache)
    checks.same_dtype("value", value, "cache", cache)
    for name, tensor in (("key", key), ("value", value), ("slots", slots)):
        checks.same_device(name, tensor, "cache", cache)


def rope_and_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Turn query and key (`rope`), write key and value (`store_kv`), return the turned query.

    query: [T, Hq, D]; key, value: [T, H, D]; cos, sin: [T, D / 2] float32; slots: [T] int64.
    """
    fast = dispatch.implementation("rope_and_store_kv", query)
    if fast is not None:
        check_rope("query", query, cos, sin)
        _check_store(key, value, cache, slots)
        checks.same_dtype("query", query, "cache", cache)
        turned: torch.Tensor = fast(
            query, key, value, cos, sin, cache, slots, interleaved=interleaved
        )
        return turned
    store_kv(rope(key, cos, sin, interleaved=interleaved), value, cache, slots)
    return rope(query, cos, sin, interleaved=interleaved)
