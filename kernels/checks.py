"""Checks that every kernel wrapper makes before it touches memory: sentences, not stack traces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that activations and the KV cache may have."""
FLOAT8 = torch.float8_e4m3fn
"""What the KV cache may have besides, with a scale for K and one for V."""
INDICES = (torch.int32, torch.int64)
"""Element types of positions, slots, block ids and lengths."""


class KernelError(ValueError):
    """An argument that a kernel cannot work with; `str()` is a sentence that names it."""


def shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Refuse `tensor` unless its shape is `expected` (None: any length). Kernels read vectors as
    they lie, so those must be contiguous."""
    actual = tensor.shape
    fits = len(actual) == len(expected)
    if fits:
        for have, want in zip(actual, expected, strict=True):
            fits = fits and (want is None or want == have)
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise KernelError(f"{name} must have the shape [{wanted}], not {list(actual)}.")
    if len(actual) == 1 and not tensor.is_contiguous():
        raise KernelError(f"{name} must be contiguous, not {tensor.stride(0)} elements apart.")


def dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse `tensor` unless its element type is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(item).removeprefix("torch.") for item in allowed)
        raise KernelError(f"{name} must be {names}, not {str(tensor.dtype)[6:]}.")


def same_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Refuse tensors of different element types."""
    if tensor.dtype != other.dtype:
        raise KernelError(
            f"{name} is {str(tensor.dtype)[6:]} but {other_name} is {str(other.dtype)[6:]}; "
            "they must be the same."
        )


def cache_dtype(
    name: str, tensor: torch.Tensor, cache: torch.Tensor, k_scale: float, v_scale: float
) -> None:
    """Refuse a cache that is neither of `tensor`'s element type nor FLOAT8, and scales that say
    nothing: for FLOAT8 a cached number c means c · scale, without it scales are 1."""
    if cache.dtype != FLOAT8:
        same_dtype(name, tensor, "cache", cache)
        if (k_scale, v_scale) != (1.0, 1.0):
            raise KernelError(
                f"k_scale ({k_scale}) and v_scale ({v_scale}) must be 1 for a cache of "
                f"{str(cache.dtype)[6:]}; only float8_e4m3fn has scales."
            )
    for scale_name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < scale < math.inf:
            raise KernelError(f"{scale_name} must be a positive, finite number, not {scale}.")


def same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Refuse tensors on different devices: a kernel would read the wrong memory."""
    if tensor.device != other.device:
        raise KernelError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            "they must be on one device."
        )


def cache_shape(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """(num_blocks, block_size, num_kv_heads, head_dim) of one layer's KV cache.

    A layer's cache is a view [num_blocks, 2, block_size, num_kv_heads, head_dim] of the pool. Only
    the distance between blocks is free: within a block, K and V each are contiguous.
    """
    if cache.dim() != 5 or cache.shape[1] != 2:
        raise KernelError(
            "cache must have the shape [num_blocks, 2, block_size, num_kv_heads, head_dim], "
            f"not {list(cache.shape)}."
        )
    blocks, _, size, heads, dim = cache.shape
    if cache.stride()[2:] != (heads * dim, dim, 1):
        raise KernelError(
            "cache must be contiguous within each of a block's K and V, "
            f"but has the strides {list(cache.stride())} for the shape {list(cache.shape)}."
        )
    return blocks, size, heads, dim
