"""Writing keys and values into the paged KV cache.

Legend: T tokens, H KV heads, D head size, N blocks in the pool, S tokens per block. The cache of a
layer is a view [N, 2, S, H, D] of the pool (K at 0, V at 1); see `checks.cache_shape`.

A cache of float8_e4m3fn holds k / k_scale and v / v_scale, rounded to the nearest (halves to even)
and limited to ±448, the largest e4m3 number; attention multiplies them by the scales again.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch
from pdserve.kernels.norm import rms_norm
from pdserve.kernels.rope import check_rope, rope

Norms = tuple[torch.Tensor, torch.Tensor, float]
"""Weights [D] of the query heads' and of the key heads' RMS norm, and its eps."""


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write K and V of T tokens: cache[slot // S, 0 or 1, slot % S] = key or value.

    key, value: [T, H, D] in the cache's dtype, or of any float dtype for a cache of float8_e4m3fn;
    cache: [N, 2, S, H, D]; slots: [T] int64, each below N · S, no slot twice. Tokens whose slot is
    negative are padding and not written.
    """
    _check_store(key, value, cache, slots, k_scale, v_scale)
    fast = dispatch.implementation("store_kv", key, cache)
    if fast is not None:
        fast(key, value, cache, slots, k_scale=k_scale, v_scale=v_scale)
        return
    size = cache.shape[2]
    if slots.numel() and int(slots.min()) < 0:
        real = slots >= 0
        key, value, slots = key[real], value[real], slots[real]
    if cache.dtype == checks.FLOAT8:  # torch cannot write single elements of that type
        key, value = _float8(key, k_scale), _float8(value, v_scale)
        cache = cache.view(torch.uint8)
    blocks, offsets = slots // size, slots % size
    cache[:, 0].index_put_((blocks, offsets), key)
    cache[:, 1].index_put_((blocks, offsets), value)


def _float8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The bytes of x / scale in float8_e4m3fn."""
    largest = torch.finfo(checks.FLOAT8).max
    return (x.float() / scale).clamp_(-largest, largest).to(checks.FLOAT8).view(torch.uint8)


def _check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    _, _, heads, dim = checks.cache_shape(cache)
    checks.shape("key", key, [None, heads, dim])
    checks.shape("value", value, key.shape)
    checks.shape("slots", slots, [key.shape[0]])
    checks.dtype("slots", slots, (torch.int64,))
    checks.dtype("key", key, checks.FLOATS)
    checks.cache_dtype("key", key, cache, k_scale, v_scale)
    checks.same_dtype("value", value, "key", key)
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
    norms: Norms | None = None,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Norm each head of query and key (`rms_norm`, if there are `norms`), turn them (`rope`), write
    key and value (`store_kv`), return the turned query.

    query: [T, Hq, D]; key, value: [T, H, D]; cos, sin: [T, D / 2] float32; slots: [T] int64.
    """
    for name, weight in () if norms is None else (("norms[0]", norms[0]), ("norms[1]", norms[1])):
        checks.shape(name, weight, [query.shape[-1]])
        checks.same_dtype(name, weight, "query", query)
        checks.same_device(name, weight, "query", query)
    fast = dispatch.implementation("rope_and_store_kv", query, cache)
    if fast is not None:
        check_rope("query", query, cos, sin)
        _check_store(key, value, cache, slots, k_scale, v_scale)
        checks.same_dtype("query", query, "key", key)
        turned: torch.Tensor = fast(
            query,
            key,
            value,
            cos,
            sin,
            cache,
            slots,
            norms=norms,
            interleaved=interleaved,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return turned
    if norms is not None:
        query, key = rms_norm(query, norms[0], norms[2]), rms_norm(key, norms[1], norms[2])
    turned_key = rope(key, cos, sin, interleaved=interleaved)
    store_kv(turned_key, value, cache, slots, k_scale=k_scale, v_scale=v_scale)
    return rope(query, cos, sin, interleaved=interleaved)
