"""Products with weights as they lie in a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, dispatch, native

FEW = 32
"""Up to so many rows the C kernel reads the weights faster than torch (bench/results)."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """x Wᵀ + b: x [T, columns], weight [rows, columns], bias [rows] → [T, rows], of one dtype.

    Sums are float32, rounded once. invariant: a row of the result has the same bits alone and in
    any batch (of one process; another number of threads may give others). torch's products are not
    like that, so then Triton computes on CUDA, on the CPU the C kernel, or, without it or in
    float16, torch row by row. Without `invariant` it holds on a CPU for up to FEW rows.
    """
    checks.shape("weight", weight, [None, None])
    checks.dtype("weight", weight, checks.FLOATS)
    checks.shape("x", x, [None, weight.shape[1]])
    checks.same_dtype("x", x, "weight", weight)
    checks.same_device("x", x, "weight", weight)
    if bias is not None:
        checks.shape("bias", bias, [weight.shape[0]])
        checks.same_dtype("bias", bias, "x", x)
        checks.same_device("bias", bias, "x", x)
    in_c = native.serves(weight) and weight.is_contiguous()
    if not invariant:
        if in_c and x.shape[0] <= FEW:
            return native.linear(x, weight, bias)
        return functional.linear(x, weight, bias)
    fast = dispatch.implementation("linear", x)
    if fast is not None:
        result: torch.Tensor = fast(x, weight, bias)
        return result
    if in_c:
        return native.linear(x, weight, bias)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    for row in range(x.shape[0]):
        # A copy: where a row happens to begin in memory must not matter either.
        out[row] = functional.linear(x[row].clone(), weight, bias)
    return out
