"""From hidden states to logits: the last norm and the output product of a decoder."""

from __future__ import annotations

import torch

from pdserve.kernels import checks, native
from pdserve.kernels.linear import FEW, linear
from pdserve.kernels.norm import rms_norm


def logits(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """rms_norm(hidden) Wᵀ, rounded to the dtype: hidden [R, E], norm [E], weight [V, E] of one
    floating dtype → [R, V] float32.

    On the CPU one call into C for up to FEW rows. invariant: see `linear`.
    """
    checks.shape("hidden", hidden, [None, weight.shape[1]])
    checks.shape("norm", norm, [weight.shape[1]])
    few = hidden.shape[0] <= FEW and not invariant
    if few and native.serves(hidden) and weight.is_contiguous() and norm.is_contiguous():
        checks.same_dtype("hidden", hidden, "weight", weight)
        checks.same_dtype("norm", norm, "weight", weight)
        return native.logits(hidden, norm, eps, weight)
    return linear(rms_norm(hidden, norm, eps), weight, invariant=invariant).float()
