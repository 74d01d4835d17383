"""Products with weights as they lie in a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, native

FEW = 32
"""Up to so many rows the C kernel reads the weights faster than torch (bench/results)."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b: x [T, columns], weight [rows, columns], bias [rows] → [T, rows], of one dtype.

    Sums are float32, rounded once. On a CPU with few rows, a row of the result has the same bits
    alone and in any other batch of few rows.
    """
    checks.shape("x", x, [None, weight.shape[1]])
    checks.same_dtype("x", x, "weight", weight)
    if x.shape[0] <= FEW and native.serves(weight) and weight.is_contiguous():
        return native.linear(x, weight, bias)
    return functional.linear(x, weight, bias)
