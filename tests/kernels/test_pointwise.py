"""Norms, activations and rotary embeddings against float64."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.kernels import (
    KernelError,
    fused_add_rms_norm,
    gelu_and_mul,
    linear,
    rms_norm,
    rope,
    silu_and_mul,
)
from pdserve.kernels.rope import default_frequencies, rope_table

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
sizes = pytest.mark.parametrize("rows", [0, 1, 17, 63])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@dtypes
@sizes
@pytest.mark.parametrize("width", [1, 63, 500, 4097])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = (torch.randn(rows, width) * 3).to(dtype), torch.randn(width).to(dtype)
    wide = x.double()
    mean = wide.square().sum(-1, keepdim=True) / width
    assert_close(rms_norm(x, weight, 1e-5), wide / (mean + 1e-5).sqrt() * weight.double())


@dtypes
def test_rms_norm_of_heads_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, 3, 16).to(dtype)[:, 1:3]
    weight = torch.randn(16).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close(rms_norm(x, weight, 1e-6), expected)


@dtypes
@sizes
def test_fused_add_rms_norm(dtype: torch.dtype, rows: int) -> None:
    x, residual = torch.randn(2, rows, 500).to(dtype)
    weight = torch.randn(500).to(dtype)
    normed, total = fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))


@dtypes
@sizes
def test_gated_activations(dtype: torch.dtype, rows: int) -> None:
    fused = torch.randn(rows, 2 * 501).to(dtype) * 3
    gate, up = fused[:, :501], fused[:, 501:]  # halves of a fused product: rows far apart
    x, other = gate.double(), up.double()
    assert_close(silu_and_mul(gate, up), x / (1 + torch.exp(-x)) * other)
    normal = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert_close(gelu_and_mul(gate, up), x * normal * other)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert_close(gelu_and_mul(gate, up, tanh=True), 0.5 * x * (1 + torch.tanh(inner)) * other)


@dtypes
@pytest.mark.parametrize("dim", [2, 16, 80])
def test_rope_turns_pairs_of_halves(dtype: torch.dtype, dim: int) -> None:
    positions = torch.tensor([0, 1, 5, 4097])
    frequencies = default_frequencies(dim, 10000.0)
    x = torch.randn(4, 3, dim).to(dtype)
    cos, sin = rope_table(frequencies, positions)
    actual = rope(x, cos, sin)
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        for pair in range(dim // 2):
            angle = torch.tensor(position * float(frequencies[pair]), dtype=torch.float64)
            first, second = x[row, :, pair].double(), x[row, :, pair + dim // 2].double()
            expected[row, :, pair] = first * angle.cos() - second * angle.sin()
            expected[row, :, pair + dim // 2] = second * angle.cos() + first * angle.sin()
    # float32 angles of thousands are off by 1e-4 themselves.
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=max(TOLERANCE[dtype] * 3, 2e-3)
    )
    assert torch.equal(actual[0], x[0])


def test_frequencies_are_powers_of_the_base() -> None:
    expected = [10000.0 ** (-2 * pair / 8) for pair in range(4)]
    assert default_frequencies(8, 10000.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    with pytest.raises(KernelError, match=r"weight must have the shape \[8\], not \[7\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(KernelError, match="x must be float32 or bfloat16 or float16, not int64"):
        rms_norm(torch.zeros(2, 8).long(), torch.zeros(8).long(), 1e-6)
    with pytest.raises(KernelError, match="residual is float16 but x is float32"):
        fused_add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 8).half(), torch.zeros(8), 1e-6)
    with pytest.raises(KernelError, match="residual is on meta but x is on cpu"):
        fused_add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 8).to("meta"), torch.zeros(8), 1e-6)
    with pytest.raises(KernelError, match="weight must be contiguous, not 2 elements apart"):
        rms_norm(torch.zeros(2, 8), torch.zeros(16)[::2], 1e-6)
    with pytest.raises(KernelError, match=r"bias must have the shape \[3\], not \[2\]"):
        linear(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2))
    with pytest.raises(KernelError, match="bias is float16 but x is float32"):
        linear(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(3).half())
    with pytest.raises(KernelError, match="weight must be float32 or bfloat16 or float16, not int"):
        linear(torch.zeros(2, 8).int(), torch.zeros(3, 8).int())
    with pytest.raises(KernelError, match=r"up must have the shape \[2, 8\]"):
        silu_and_mul(torch.zeros(2, 8), torch.zeros(2, 9))
    with pytest.raises(KernelError, match=r"cos must have the shape \[2, 4\]"):
        rope(torch.zeros(2, 1, 8), torch.zeros(2, 8), torch.zeros(2, 4))
    with pytest.raises(KernelError, match="sin must be float32, not bfloat16"):
        rope(torch.zeros(2, 1, 8), torch.zeros(2, 4), torch.zeros(2, 4).bfloat16())
