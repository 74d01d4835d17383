"""Products with quantised weights by Triton in its interpreter, against float64. bfloat16 products
are left out: the interpreter computes them wrongly (bench/gpu/check.sh compares them on a GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised_weights import random_nibbles, random_weight

from pdserve import kernels
from pdserve.kernels import dispatch
from pdserve.kernels.quantized import FEW, MANY

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_quantized = pytest.importorskip("pdserve.kernels.triton_quantized")
tile_for = triton_quantized.tile_for

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
halves = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
KINDS = ["int8", "fp8", "awq", "gptq", "gptq_v2"]

pytestmark = pytest.mark.usefixtures("interpreted")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    error = (actual.double() - expected).norm() / expected.norm().clamp(1e-30)
    assert error.item() < TOLERANCE[actual.dtype], f"relative error {error.item():.2e}"


@halves
@pytest.mark.parametrize(
    ("rows", "width", "columns", "group"),
    [
        (0, 16, 64, 32),
        (1, 8, 32, 32),
        (1, 136, 384, 128),
        (17, 72, 176, 32),
        (63, 136, 200, -1),
        (500, 24, 96, 64),
        (65, 136, 24, -1),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_float64(
    kind: str, rows: int, width: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    weight, matrix = random_weight(kind, width, columns, group)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(width).to(dtype)
    expected = x.double() @ matrix.t()
    assert_close(kernels.quantized_linear(x, weight, bias), expected + bias.double())
    if rows <= 17:
        assert_close(kernels.quantized_linear(x, weight), expected)


@halves
def test_rows_of_x_may_lie_apart(dtype: torch.dtype) -> None:
    weight, matrix = random_weight("int8", 20, 33)
    wide = torch.randn(5, 70).to(dtype)
    for x in (wide[:, 3:36], wide[:, ::2][:, :33]):
        assert_close(kernels.quantized_linear(x, weight), x.double() @ matrix.t())


@halves
def test_inputs_in_another_order(dtype: torch.dtype) -> None:
    made = random_nibbles(24, 144, 32, scattered=True)
    tensors = made.gptq()
    values, order = kernels.sort_groups(tensors["qweight"], tensors["g_idx"], 32)
    weight = kernels.QuantizedWeight(
        packing="gptq",
        values=values,
        zeros=tensors["qzeros"],
        scales=tensors["scales"],
        group=32,
        columns=144,
        zero_offset=1,
        order=order,
    )
    for rows in (7, MANY):
        x = torch.randn(rows, 144).to(dtype)
        assert_close(kernels.quantized_linear(x, weight), x.double() @ made.matrix.t())
    assert_close(kernels.dequantize(weight, dtype), made.matrix)


@halves
@pytest.mark.parametrize(("width", "columns", "group"), [(8, 24, -1), (72, 176, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_the_one_that_was_packed(
    kind: str, width: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    weight, matrix = random_weight(kind, width, columns, group)
    assert_close(kernels.dequantize(weight, dtype), matrix)
    x, bias = torch.randn(MANY, columns).to(dtype), torch.randn(width).to(dtype)
    expected = x.double() @ matrix.t() + bias.double()
    assert_close(kernels.quantized_linear(x, weight, bias), expected)


def test_every_byte_of_e4m3_means_what_torch_says() -> None:
    numbers = torch.arange(256).to(torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F]  # not the two NaNs
    values = numbers.view(torch.float8_e4m3fn)
    columns = values.shape[0]
    weight = kernels.QuantizedWeight(
        packing="bytes",
        values=values.view(1, -1).contiguous(),
        scales=torch.ones(1, 1),
        group=columns,
        columns=columns,
    )
    for dtype in TOLERANCE:
        found = kernels.quantized_linear(torch.eye(columns, dtype=dtype), weight)
        assert torch.equal(found[:, 0], values.to(dtype))


@triton.jit
def differences_kernel(out_ptr, DTYPE: tl.constexpr):
    small = tl.arange(0, 16)
    # Subtracted in float32, because the interpreter cannot subtract bfloat16.
    numbers = triton_quantized.biased(small, DTYPE).to(tl.float32)
    offset = small[:, None] * 16 + small[None, :]
    tl.store(out_ptr + offset, numbers[:, None] - numbers[None, :])


@pytest.mark.parametrize("dtype", [tl.float32, tl.float16, tl.bfloat16], ids=str)
def test_differences_of_four_bits_are_exact(dtype: Any) -> None:
    out = torch.empty(16, 16)
    differences_kernel[(1,)](out, DTYPE=dtype)
    small = torch.arange(16.0)
    assert torch.equal(out, small[:, None] - small[None, :])


@halves
@pytest.mark.usefixtures("rows_alone")
@pytest.mark.parametrize("kind", ["int8", "awq", "gptq"])
def test_a_row_has_the_same_bits_in_any_batch(kind: str, dtype: torch.dtype) -> None:
    weight, _ = random_weight(kind, 40, 384, 64)
    assert tile_for(weight, dtype, many=False).splits > 1
    x, bias = torch.randn(80, 384).to(dtype), torch.randn(40).to(dtype)
    many = kernels.quantized_linear(x, weight, bias, invariant=True)
    few = kernels.quantized_linear(x[:63], weight, bias)
    for row in (0, 16, 62):
        alone = kernels.quantized_linear(x[row : row + 1], weight, bias)
        assert torch.equal(alone[0], few[row])
        assert torch.equal(alone[0], many[row])


def test_tiles_follow_from_the_weight_alone() -> None:
    weight = kernels.QuantizedWeight(
        packing="gptq",
        values=torch.zeros(512, 4096).int(),
        zeros=torch.zeros(32, 512).int(),
        scales=torch.ones(32, 4096),
        group=128,
        columns=4096,
    )
    few = tile_for(weight, torch.bfloat16, many=False)
    assert (few.rows, few.splits) == (16, 4)
    assert tile_for(weight, torch.bfloat16, many=True).splits == 1
    narrow, _ = random_weight("awq", 64, 64, 16)
    assert tile_for(narrow, torch.float32, many=True).columns == 16


def test_a_model_is_loaded_with_its_kernels_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = random_weight("awq", 16, 32, 32)
    ran = []

    def noted(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        ran.append((x.shape[0], options["invariant"]))
        return x

    monkeypatch.setattr(triton_quantized, "quantized_linear", noted)
    dispatch.forget()
    kernels.compile_products(weight, torch.float16)
    assert ran == [(1, False), (FEW + 1, False), (MANY, False)]
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    dispatch.forget()
    kernels.compile_products(weight, torch.float16)
    assert len(ran) == 3
