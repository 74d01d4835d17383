"""Gated activations in Triton; see `pdserve.kernels.activation` for the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
KINDS = {"silu": "silu", "gelu": "erf", "gelu_pytorch_tanh": "tanh"}
"""What `activated` calls the activations of `pdserve.kernels.activation.GATES`."""


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `pdserve.kernels.silu_and_mul`."""
    return _launch(gate, up, "silu")


def gelu_and_mul(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = False) -> torch.Tensor:
    """See `pdserve.kernels.gelu_and_mul`."""
    return _launch(gate, up, "tanh" if tanh else "erf")


def _launch(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    up = up if up.stride(-1) == 1 else up.contiguous()
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gated_kernel[(rows, triton.cdiv(width, BLOCK))](
        gate,
        up,
        out,
        width,
        gate.stride(0),
        up.stride(0),
        KIND=kind,
        BLOCK=BLOCK,
    )
    return out


@triton.jit
def tanh_of(x):
    """tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|): exact at both ends."""
    e = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -value, value)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The activation of float32 x: "silu", gelu's "erf", or its "tanh"."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "erf":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = 0.5 * x * (1.0 + tanh_of(inner))
    return y


@triton.jit
def gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, BLOCK columns: out = act(gate) · up in float32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    y = activated(x, KIND) * up
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=mask)
