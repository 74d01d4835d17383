"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, dispatch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    x: [..., D] float32/bfloat16/float16, last dimension contiguous; weight: [D], same dtype.
    Computed in float32 and rounded once at the end. Each row depends on itself only.
    """
    _check(x, weight)
    fast = dispatch.implementation("rms_norm", x)
    if fast is not None:
        result: torch.Tensor = fast(x, weight, eps)
        return result
    return functional.rms_norm(x, weight.shape, weight, eps)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype before the norm.

    x, residual: [..., D] of one shape and dtype; weight: [D].
    """
    checks.shape("residual", residual, x.shape)
    checks.same_dtype("residual", residual, "x", x)
    checks.same_device("residual", residual, "x", x)
    fast = dispatch.implementation("fused_add_rms_norm", x)
    if fast is not None:
        _check(x, weight)
        pair: tuple[torch.Tensor, torch.Tensor] = fast(x, residual, weight, eps)
        return pair
    total = x + residual
    return rms_norm(total, weight, eps), total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    checks.dtype("x", x, checks.FLOATS)
    checks.shape("weight", weight, [x.shape[-1]])
    checks.same_dtype("weight", weight, "x", x)
    checks.same_device("weight", weight, "x", x)
