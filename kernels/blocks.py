"""Moving whole KV blocks, all layers at once, between the pool and one contiguous buffer.

Legend: N blocks in the pool, n blocks to move, L layers, S tokens per block of the pool, S' of the
buffer, H KV heads, D head size. What travels may be a slice of the heads (for workers that split
the heads differently) and may have another block size (for pools that were cut differently).
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch
from pdserve.kernels import wire as formats


def gather_blocks(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    heads: tuple[int, int] | None = None,
    block_size: int | None = None,
    wire: str | None = None,
) -> torch.Tensor:
    """Copy blocks into one contiguous buffer: out[i] = pool[block_ids[i]].

    pool: [N, ...] contiguous; block_ids: [n], int32 or int64, each below N; out: [n, ...].
    With `heads` (first, count) or `block_size` the pool is [N, L, 2, S, H, D] and the result
    [⌈n S / S'⌉, L, 2, S', count, D]: token t of the list, in pool block block_ids[t // S] at t % S,
    lies in buffer block t // S' at t % S'; what the last block has beyond n S tokens is zero.
    With `wire` "int8" or "fp8" the buffer holds such blocks packed, [.., nbytes] uint8: for the
    layout and the error see `pdserve.kernels.wire`.
    """
    shape = _buffer_shape(pool, block_ids, heads, block_size, wire)
    if wire is not None:
        return _pack(pool, block_ids, out, shape, heads, block_size, wire)
    if out is None:
        out = torch.empty(shape, dtype=pool.dtype, device=pool.device)
    _check_buffer("out", out, shape, pool)
    source, target = _movable(pool), _movable(out)
    fast = dispatch.implementation("gather_blocks", source)
    if fast is not None:
        fast(source, block_ids, target, heads=heads)
    elif heads is None and block_size is None:
        torch.index_select(source, 0, block_ids, out=target)
    else:
        first, count = heads or (0, pool.shape[4])
        taken = source[..., first : first + count, :].index_select(0, block_ids)
        tokens = taken.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        room = tokens.new_zeros((shape[0] * shape[3], *tokens.shape[1:]))
        room[: tokens.shape[0]] = tokens
        target.copy_(room.unflatten(0, (shape[0], shape[3])).permute(0, 2, 3, 1, 4, 5))
    return out


def scatter_blocks(
    buffer: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    heads: tuple[int, int] | None = None,
    block_size: int | None = None,
    wire: str | None = None,
) -> None:
    """The inverse of `gather_blocks`: pool[block_ids[i]] = buffer[i]; no block twice.

    Arguments as there; `block_size` is the buffer's. Heads that do not travel keep their values.
    Packed blocks (`wire`) may come from a pool of another dtype.
    """
    shape = _buffer_shape(pool, block_ids, heads, block_size, wire)
    if wire is not None:
        _unpack(buffer, pool, block_ids, shape, heads, block_size, wire)
        return
    _check_buffer("buffer", buffer, shape, pool)
    buffer, pool = _movable(buffer), _movable(pool)
    fast = dispatch.implementation("scatter_blocks", pool)
    if fast is not None:
        fast(buffer, pool, block_ids, heads=heads)
    elif heads is None and block_size is None:
        pool.index_copy_(0, block_ids.long(), buffer)
    else:
        size, (first, count) = pool.shape[3], heads or (0, pool.shape[4])
        tokens = buffer.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)[: block_ids.shape[0] * size]
        blocks = tokens.unflatten(0, (block_ids.shape[0], size)).permute(0, 2, 3, 1, 4, 5)
        pool[..., first : first + count, :].index_copy_(0, block_ids.long(), blocks)


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that torch can select: bytes instead of float8.
    (And copying bytes needs no new GPU.)"""
    return tensor.view(torch.uint8) if tensor.dtype == checks.FLOAT8 else tensor


def _pack(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    out: torch.Tensor | None,
    shape: list[int],
    heads: tuple[int, int] | None,
    block_size: int | None,
    wire: str,
) -> torch.Tensor:
    count, block = shape[0], shape[1:]
    if out is None:
        size = formats.packed_nbytes(block)
        out = torch.empty((count, size), dtype=torch.uint8, device=pool.device)
    formats.check("out", out, count, block)
    checks.same_device("out", out, "pool", pool)
    data, scales = formats.sections(out, block, wire)
    fast = dispatch.implementation("pack_blocks", pool, data)
    if fast is not None:
        fast(pool, block_ids, data, scales, heads=heads)
        return out
    plain = gather_blocks(pool, block_ids, heads=heads, block_size=block_size)
    packed, found = formats.encode(plain, data.dtype)
    data.view(torch.uint8).copy_(packed.view(torch.uint8))
    scales.copy_(found)
    return out


def _unpack(
    buffer: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    shape: list[int],
    heads: tuple[int, int] | None,
    block_size: int | None,
    wire: str,
) -> None:
    formats.check("buffer", buffer, shape[0], shape[1:])
    checks.same_device("buffer", buffer, "pool", pool)
    data, scales = formats.sections(buffer, shape[1:], wire)
    fast = dispatch.implementation("unpack_blocks", pool, data)
    if fast is not None:
        fast(data, scales, pool, block_ids, heads=heads)
        return
    plain = formats.decode(data, scales, pool.dtype)
    scatter_blocks(plain, pool, block_ids, heads=heads, block_size=block_size)


def _buffer_shape(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    heads: tuple[int, int] | None,
    block_size: int | None,
    wire: str | None,
) -> list[int]:
    checks.shape("block_ids", block_ids, [None])
    checks.dtype("block_ids", block_ids, checks.INDICES)
    checks.same_device("block_ids", block_ids, "pool", pool)
    if not pool.is_contiguous():
        raise checks.KernelError(
            f"pool must be contiguous, but has the strides {list(pool.stride())} for the shape "
            f"{list(pool.shape)}."
        )
    count = block_ids.shape[0]
    if wire is not None:
        if wire not in formats.DTYPES:
            raise checks.KernelError(
                f"wire must be None, {' or '.join(map(repr, formats.DTYPES))}, not {wire!r}."
            )
        checks.dtype("pool", pool, checks.FLOATS)
    elif heads is None and block_size is None:
        return [count, *pool.shape[1:]]
    checks.shape("pool", pool, [None, None, 2, None, None, None])
    _, layers, kinds, size, kv_heads, dim = pool.shape
    first, taken = heads or (0, kv_heads)
    if first < 0 or taken < 1 or first + taken > kv_heads:
        raise checks.KernelError(
            f"heads ({first}, {taken}) must be (first, count) within the pool's {kv_heads} heads."
        )
    other = size if block_size is None else block_size
    if other < 1:
        raise checks.KernelError(f"block_size must be at least 1, not {other}.")
    return [-(-count * size // other), layers, kinds, other, taken, dim]


def _check_buffer(name: str, buffer: torch.Tensor, shape: list[int], pool: torch.Tensor) -> None:
    checks.shape(name, buffer, shape)
    checks.same_dtype(name, buffer, "pool", pool)
    checks.same_device(name, buffer, "pool", pool)
    if not buffer.is_contiguous():
        raise checks.KernelError(f"{name} must be contiguous, not {list(buffer.stride())}.")
