"""Gated activations of the feed-forward layers (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, dispatch


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up with silu(x) = x / (1 + exp(-x)).

    gate, up: [T, I] of one floating dtype; rows contiguous, any distance between rows, so that both
    may be halves of one fused product. Returns [T, I].
    """
    _check(gate, up)
    fast = dispatch.implementation("silu_and_mul", gate)
    if fast is not None:
        result: torch.Tensor = fast(gate, up)
        return result
    return functional.silu(gate).mul_(up)


def gelu_and_mul(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = False) -> torch.Tensor:
    """gelu(gate) · up (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    tanh: use 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) in place of x Φ(x). Shapes as
    `silu_and_mul`.
    """
    _check(gate, up)
    fast = dispatch.implementation("gelu_and_mul", gate)
    if fast is not None:
        result: torch.Tensor = fast(gate, up, tanh=tanh)
        return result
    return functional.gelu(gate, approximate="tanh" if tanh else "none").mul_(up)


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    checks.shape("gate", gate, [None, None])
    checks.shape("up", up, gate.shape)
    checks.dtype("gate", gate, checks.FLOATS)
    checks.same_dtype("up", up, "gate", gate)
    checks.same_device("up", up, "gate", gate)
