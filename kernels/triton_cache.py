"""Norms of heads, rotary embeddings and the write into the paged cache in Triton, in one pass.

One program turns a few heads of one token. See `pdserve.kernels.rope` and `pdserve.kernels.cache`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.checks import FLOAT8
from pdserve.kernels.triton_float8 import to_e4m3

HEADS = 8
"""Heads per program."""


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """See `pdserve.kernels.rope`."""
    x = _heads(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _launch(x, None, None, cos, sin, out, None, None, interleaved)
    return out


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `pdserve.kernels.store_kv`."""
    if key.numel():
        scales = (k_scale, v_scale)
        _launch(None, _heads(key), _heads(value), None, None, None, cache, slots, False, scales)


def rope_and_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `pdserve.kernels.rope_and_store_kv`."""
    query, key, value = _heads(query), _heads(key), _heads(value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel():
        scales = (k_scale, v_scale)
        _launch(query, key, value, cos, sin, out, cache, slots, interleaved, scales, norms)
    return out


def _heads(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out: torch.Tensor | None,
    cache: torch.Tensor | None,
    slots: torch.Tensor | None,
    interleaved: bool,
    scales: tuple[float, float] = (1.0, 1.0),
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    some = query if query is not None else key
    assert some is not None
    tokens, _, dim = some.shape
    query_heads = 0 if query is None else query.shape[1]
    kv_heads = 0 if key is None else key.shape[1]
    query_blocks = triton.cdiv(query_heads, HEADS)
    # Unused arguments need some tensor in their place; the flags keep the kernel away from them.
    q, k = (query if query is not None else some), (key if key is not None else some)
    v = value if value is not None else some
    rows = cos.contiguous() if cos is not None else some
    other = sin.contiguous() if sin is not None else some
    paged = cache if cache is not None else some
    rope_store_kernel[(tokens, query_blocks + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        rows,
        other,
        out if out is not None else some,
        paged,
        slots if slots is not None else some,
        *((some, some) if norms is None else norms[:2]),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        paged.stride(0),
        paged.stride(1),
        *scales,
        0.0 if norms is None else norms[2],
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF=triton.next_power_of_2(triton.cdiv(dim, 2)),
        SIZE=1 if cache is None else cache.shape[2],
        QUERY_BLOCKS=query_blocks,
        HEADS=HEADS,
        TURNS=cos is not None,
        INTERLEAVED=interleaved,
        NORMED=norms is not None,
        FLOAT8=paged.dtype == FLOAT8,
        num_warps=2,
    )


@triton.jit
def halves(dim, half, INTERLEAVED: tl.constexpr):
    """Where the first and the second of each pair are within a head."""
    if INTERLEAVED:
        first = 2 * half
        second = 2 * half + 1
    else:
        first = half
        second = half + (dim + 1) // 2
    return first, second


@triton.jit
def normed(x1, x2, weight_ptr, first, second, eps, DIM: tl.constexpr):
    """Both halves of heads over their root mean square, weighted, rounded as if stored: float32."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
    factor = (1.0 / tl.sqrt_rn(squares / DIM + eps))[:, None]
    w1 = tl.load(weight_ptr + first, mask=first < DIM, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + second, mask=second < DIM, other=0.0).to(tl.float32)
    x1 = (x1 * factor * w1).to(dtype).to(tl.float32)
    x2 = (x2 * factor * w2).to(dtype).to(tl.float32)
    return x1, x2


@triton.jit
def cached(x, scale, FLOAT8: tl.constexpr):
    """x as the cache holds it."""
    if FLOAT8:
        x = to_e4m3(tl.div_rn(x.to(tl.float32), scale + tl.zeros(x.shape, tl.float32)))
    return x


@triton.jit
def rope_store_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    cache_ptr,
    slot_ptr,
    query_norm_ptr,
    key_norm_ptr,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    cache_block,
    cache_kind,
    k_scale,
    v_scale,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    TURNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Token pid 0; pid 1 below QUERY_BLOCKS: its query heads, above: its K and V heads."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half = tl.arange(0, HALF)[None, :]
    first, second = halves(DIM, half, INTERLEAVED)
    if TURNS:
        angle = token * (DIM // 2) + half
        cos = tl.load(cos_ptr + angle, mask=half < DIM // 2, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=half < DIM // 2, other=0.0)
    if QUERY_HEADS > 0:
        if block < QUERY_BLOCKS:
            head = block * HEADS + tl.arange(0, HEADS)[:, None]
            one = (head < QUERY_HEADS) & (first < DIM) & (half < (DIM + 1) // 2)
            two = (head < QUERY_HEADS) & (second < DIM)
            source = query_ptr + token * query_token + head.to(tl.int64) * query_head
            x1 = tl.load(source + first, mask=one, other=0.0).to(tl.float32)
            x2 = tl.load(source + second, mask=two, other=0.0).to(tl.float32)
            if NORMED:
                x1, x2 = normed(x1, x2, query_norm_ptr, first, second, eps, DIM)
            target = out_ptr + (token * QUERY_HEADS + head) * DIM
            y1 = (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty)
            y2 = (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty)
            tl.store(target + first, y1, mask=one)
            tl.store(target + second, y2, mask=two)
    if KV_HEADS > 0:
        if block >= QUERY_BLOCKS:
            slot = tl.load(slot_ptr + token).to(tl.int64)
            head = (block - QUERY_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
            used = (head < KV_HEADS) & ((slot + tl.zeros_like(head)) >= 0)
            one = used & (first < DIM) & (half < (DIM + 1) // 2)
            two = used & (second < DIM)
            place = cache_ptr + (slot // SIZE) * cache_block + (slot % SIZE) * (KV_HEADS * DIM)
            place = place + head * DIM
            source = key_ptr + token * key_token + head.to(tl.int64) * key_head
            k1 = tl.load(source + first, mask=one, other=0.0)
            k2 = tl.load(source + second, mask=two, other=0.0)
            if TURNS:
                w1 = k1.to(tl.float32)
                w2 = k2.to(tl.float32)
                if NORMED:
                    w1, w2 = normed(w1, w2, key_norm_ptr, first, second, eps, DIM)
                k1 = (w1 * cos - w2 * sin).to(key_ptr.dtype.element_ty)
                k2 = (w2 * cos + w1 * sin).to(key_ptr.dtype.element_ty)
            tl.store(place + first, cached(k1, k_scale, FLOAT8), mask=one)
            tl.store(place + second, cached(k2, k_scale, FLOAT8), mask=two)
            source = value_ptr + token * value_token + head.to(tl.int64) * value_head
            v1 = tl.load(source + first, mask=one, other=0.0)
            v2 = tl.load(source + second, mask=two, other=0.0)
            place += cache_kind
            tl.store(place + first, cached(v1, v_scale, FLOAT8), mask=one)
            tl.store(place + second, cached(v2, v_scale, FLOAT8), mask=two)
