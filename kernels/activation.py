"""Gated activations of the feed-forward layers (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as functional

from pdserve.kernels import checks, dispatch


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor, *, invariant: bool = False) -> torch.Tensor:
    """silu(gate) · up with silu(x) = x / (1 + exp(-x)).

    gate, up: [T, I] of one floating dtype; rows contiguous, any distance between rows, so that both
    may be halves of one fused product. Returns [T, I].

    invariant: a row has the same bits alone and in any batch, as it always has on CUDA. On the CPU
    torch computes what is left over at the end of a tensor, or of a thread's share, by another
    exponential: then row by row.
    """
    _check(gate, up)
    fast = dispatch.implementation("silu_and_mul", gate)
    if fast is not None:
        result: torch.Tensor = fast(gate, up)
        return result
    if invariant:
        return _row_by_row(functional.silu, gate, up)
    return functional.silu(gate).mul_(up)


def gelu_and_mul(
    gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = False, invariant: bool = False
) -> torch.Tensor:
    """gelu(gate) · up (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    tanh: use 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) in place of x Φ(x). Shapes and
    `invariant` as for `silu_and_mul`.
    """
    _check(gate, up)
    fast = dispatch.implementation("gelu_and_mul", gate)
    if fast is not None:
        result: torch.Tensor = fast(gate, up, tanh=tanh)
        return result
    activate = partial(functional.gelu, approximate="tanh" if tanh else "none")
    if invariant:
        return _row_by_row(activate, gate, up)
    return activate(gate).mul_(up)


GATES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": partial(gelu_and_mul, tanh=True),
}
"""The gated activations by their names in a model's configuration."""


def _row_by_row(
    activate: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for row in range(gate.shape[0]):
        torch.mul(activate(gate[row]), up[row], out=out[row])
    return out


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    checks.shape("gate", gate, [None, None])
    checks.shape("up", up, gate.shape)
    checks.dtype("gate", gate, checks.FLOATS)
    checks.same_dtype("up", up, "gate", gate)
    checks.same_device("up", up, "gate", gate)
