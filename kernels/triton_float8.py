"""float8_e4m3fn in Triton: rounding that is the same compiled, interpreted and in torch."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_e4m3(x):
    """float32 → float8e4nv, nearest, halves to even, limited to ±448; NaN stays NaN.

    The GPU's own conversion does that. For the interpreter, which would cut off, it is rounded here
    to 3 bits of mantissa (below 2⁻⁶ to multiples of 2⁻⁹), so that the conversion has nothing left
    to round."""
    if not INTERPRETED:
        return x.to(tl.float8e4nv)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    normal = bits.to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # 1.5 · 2¹⁴, whose neighbours are 2⁻⁹ apart
    rounded = tl.where(tl.abs(x) < 0.015625, small, normal)
    limited = tl.where(rounded > 448.0, 448.0, tl.where(rounded < -448.0, -448.0, rounded))
    return tl.where(x == x, limited, x).to(tl.float8e4nv)
