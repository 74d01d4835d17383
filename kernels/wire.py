"""Smaller forms of KV for the way between two pools: a byte per element, a scale per head vector.

A packed block is the data of one block [L, 2, S, H, D] (L layers, S tokens, H KV heads, D head
size), then its scales, each padded to a multiple of 16 bytes; all in one row of bytes:

    bytes 0 .. L 2 S H D - 1          q [L, 2, S, H, D], int8 or float8_e4m3fn
    from the next multiple of 16 on   scale [L, 2, S, H], float32
    up to the next multiple of 16     nothing (undefined)

A head vector (K or V of one token and one head) x of D elements has the scale max|x| / Q; what
arrives is x' = q · scale, computed in float32 and rounded once to the dtype of the target's pool:

    "int8"  Q = 127, q = round(x / scale), halves to even:    |x - x'| ≤ scale / 2
    "fp8"   Q = 448, q = x / scale rounded to e4m3:           |x - x'| ≤ max(|x| / 16, scale / 1024)

for scales from 2⁻¹²⁶ on, up to float32's rounding and the target's. The scale belongs to a vector
and not to a block, so x' depends on x alone: not on the tokens beside it, on what an unfilled row
of the block holds, nor on how either side cuts blocks and heads. That costs 4 bytes for D elements
(3 % at 128). A vector of zeros arrives as zeros, one that holds a NaN or an infinity as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pdserve.kernels import checks

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Wire format → type of the packed elements."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude of an element: Q."""
ALIGNMENT = 16
"""Bytes: of the packed blocks, and of the scales within one."""


def packed_nbytes(shape: Sequence[int]) -> int:
    """Bytes of one packed block of `shape` [L, 2, S, H, D], in either format."""
    rows = math.prod(shape[:-1])
    return aligned(rows * shape[-1]) + aligned(4 * rows)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def sections(
    packed: torch.Tensor, shape: Sequence[int], wire: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data [n, *shape] and scales [n, *shape[:-1]] of packed blocks, as views.

    packed: [n, packed_nbytes(shape)] uint8, contiguous, aligned to 16 bytes; shape: a block's."""
    rows = math.prod(shape[:-1])
    begin = aligned(rows * shape[-1])
    data = packed[:, : rows * shape[-1]].view(DTYPES[wire])
    scales = packed[:, begin : begin + 4 * rows].view(torch.float32)
    return data.unflatten(1, tuple(shape)), scales.unflatten(1, tuple(shape[:-1]))


def encode(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] of any float dtype → q [..., D] in `dtype` (a key of LARGEST) and scale [...]."""
    wide, largest = x.float(), LARGEST[dtype]
    scale = wide.abs().amax(-1) / largest
    scale = scale.masked_fill(~scale.isfinite(), math.nan)
    divisor = scale.unsqueeze(-1)
    ratio = torch.where(divisor > 0, wide / divisor, 0.0).clamp_(-largest, largest)
    return (ratio.round_() if dtype == torch.int8 else ratio).to(dtype), scale


def decode(data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, up to its error: x' [..., D] in `dtype`."""
    return (data.float() * scales.unsqueeze(-1)).to(dtype)


def check(name: str, packed: torch.Tensor, count: int, shape: Sequence[int]) -> None:
    """Refuse `packed` unless it can hold `count` packed blocks of `shape`."""
    checks.shape(name, packed, [count, packed_nbytes(shape)])
    checks.dtype(name, packed, (torch.uint8,))
    if not packed.is_contiguous() or packed.data_ptr() % ALIGNMENT:
        raise checks.KernelError(
            f"{name} must be contiguous and begin at a multiple of {ALIGNMENT} bytes."
        )
