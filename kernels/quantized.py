"""Products with weights of eight or four bits, weight-only: activations keep their precision."""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch
from pdserve.kernels.linear import linear
from pdserve.kernels.quantized_weight import QuantizedWeight, stored_matrix

FEW = 64
"""Up to so many rows a kernel's tile is low, which reads the weight at full speed; above, it is
high, which reads it fewer times."""
MANY = 512
"""From so many rows on, a dequantised copy costs less than unpacking the weight for every tile."""


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """x Wᵀ + b for the matrix W that `weight` stands for.

    x: [T, K] float32, float16 or bfloat16, contiguous rows at any distance; bias: [N] in x's
    dtype. Returns [T, N] in x's dtype; sums are float32, rounded once.

    invariant: a row of the result has the same bits in any batch. Without it Triton gives the same
    bits in any batch of up to FEW rows: tiles, and the split of the sum over K, depend on the
    weight's shape alone. More rows get other tiles, and MANY a dequantised copy of W and torch's
    product. The reference multiplies by S, rounded to x's dtype, with what `linear`
    promises.
    """
    checks.shape("x", x, [None, weight.columns])
    checks.dtype("x", x, checks.FLOATS)
    checks.same_device("x", x, "weight.values", weight.values)
    if bias is not None:
        checks.shape("bias", bias, [weight.rows])
        checks.same_dtype("bias", bias, "x", x)
        checks.same_device("bias", bias, "x", x)
    fast = dispatch.implementation("quantized_linear", x)
    if fast is not None:
        result: torch.Tensor = fast(x, weight, bias, invariant=invariant)
        return result
    if weight.order is not None:
        x = x[:, weight.order]
    return linear(x, stored_matrix(weight, x.dtype), bias, invariant=invariant)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix W [N, K] that `weight` stands for, rounded once to `dtype`: float32, float16 or
    bfloat16."""
    if dtype not in checks.FLOATS:
        raise checks.KernelError(
            f"dtype must be float32, float16 or bfloat16, not {str(dtype)[6:]}."
        )
    fast = dispatch.implementation("dequantize", weight.scales)
    if fast is not None:
        result: torch.Tensor = fast(weight, dtype)
        return result
    stored = stored_matrix(weight, dtype)
    if weight.order is None:
        return stored
    matrix = torch.empty_like(stored)
    matrix[:, weight.order] = stored
    return matrix


def compile_products(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> None:
    """Run `quantized_linear` once for each number of rows that it treats differently, so that its
    kernels are compiled when a model is loaded and not by a request. Nothing to do for the
    reference."""
    if dispatch.implementation("quantized_linear", weight.scales) is None:
        return
    for rows in (1, FEW + 1, MANY):
        x = torch.zeros(rows, weight.columns, dtype=dtype, device=weight.values.device)
        quantized_linear(x, weight, bias, invariant=invariant)
