"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their scalings.

NeoX layout: dimension i of the first half turns together with dimension i of the second half.
Interleaved layout (the paper's): dimension 2i turns together with dimension 2i + 1.
The frequency functions return float32 [D / 2]; `rope_table` turns frequencies into angles.
"""

from __future__ import annotations

import math

import torch

from pdserve.kernels import checks, dispatch


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Turn each pair (x1, x2) by its token's angle: (x1 cos - x2 sin, x2 cos + x1 sin).

    x: [T, H, D], last two dimensions contiguous, float32/bfloat16/float16; x1 = x[..., :D/2], or
    x[..., 0::2] with `interleaved`.
    cos, sin: [T, D / 2] float32, the table's rows at the tokens' positions.
    Computed in float32, rounded once. Returns a new tensor like x.
    """
    check_rope("x", x, cos, sin)
    fast = dispatch.implementation("rope", x)
    if fast is not None:
        result: torch.Tensor = fast(x, cos, sin, interleaved=interleaved)
        return result
    half = x.shape[-1] // 2
    one, two = (slice(0, half), slice(half, None))
    if interleaved:
        one, two = (slice(0, None, 2), slice(1, None, 2))
    source = x.float()
    first, second = source[..., one], source[..., two]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.empty_like(source)
    # Each product is rounded: fused ones differ between torch's vectors and what is left over.
    turned[..., one] = torch.mul(first, cos).sub_(second * sin)
    turned[..., two] = torch.mul(second, cos).add_(first * sin)
    return turned.to(x.dtype)


def check_rope(name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuse what `rope` cannot turn; x is called `name`."""
    checks.shape(name, x, [None, None, None])
    checks.dtype(name, x, checks.FLOATS)
    if x.shape[-1] % 2:
        raise checks.KernelError(
            f"{name} must have an even head size for rotary embeddings, not {x.shape[-1]}."
        )
    for label, rows in (("cos", cos), ("sin", sin)):
        checks.shape(label, rows, [x.shape[0], x.shape[-1] // 2])
        checks.dtype(label, rows, (torch.float32,))
        checks.same_device(label, rows, name, x)


def rope_table(
    frequencies: torch.Tensor, positions: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency, times `scale`: each [P, D / 2] float32.

    frequencies: [D / 2], or [P, D / 2] where they depend on the position; positions: [P].
    """
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos().mul_(scale), angles.sin().mul_(scale)


def default_frequencies(dim: int, base: float) -> torch.Tensor:
    """base^(-2i / dim) for i in 0 .. dim/2 - 1."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def linear_frequencies(dim: int, base: float, factor: float) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): all frequencies / factor."""
    return default_frequencies(dim, base) / factor


def dynamic_frequencies(
    dim: int, base: float, factor: float, max_positions: int, lengths: torch.Tensor
) -> torch.Tensor:
    """Dynamic NTK scaling: [P, dim / 2], for sequences of the given lengths [P].

    base(n) = base · (factor · n / max_positions - (factor - 1))^(dim / (dim - 2)) for lengths n
    above `max_positions`, the plain base below (bloc97 and emozilla 2023, as in transformers).
    """
    lengths = lengths.clamp(min=max_positions)
    growth = (factor * lengths / max_positions) - (factor - 1)
    bases = base * growth ** (dim / (dim - 2))
    return 1.0 / (bases[:, None] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def llama3_frequencies(
    dim: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_positions: int,
) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are divided by factor, short ones kept, a ramp between.

    With w = 2π / f: w < original/high: f; w > original/low: f / factor; otherwise
    (1 - s) f / factor + s f with s = (original / w - low) / (high - low).
    """
    plain = default_frequencies(dim, base)
    waves = 2 * math.pi / plain
    smooth = (original_positions / waves - low_freq_factor) / (high_freq_factor - low_freq_factor)
    ramp = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(waves > original_positions / low_freq_factor, plain / factor, ramp)
    return torch.where(waves < original_positions / high_freq_factor, plain, scaled)


def yarn_frequencies(
    dim: int,
    base: float,
    factor: float,
    original_positions: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, equations 17 to 23).

    Dimensions that turn more than `beta_fast` times within the original length keep their
    frequency, those below `beta_slow` are divided by `factor`, a linear ramp lies between.
    truncate: round the ramp's ends outwards to whole dimensions.
    """

    def dimension(rotations: float) -> float:
        turns = math.log(original_positions / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(base))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    powers = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def yarn_attention_scale(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's temperature on cos and sin: 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)
