"""Quantised weights: the plain-torch references against float64, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from quantised_weights import random_nibbles, random_weight

from pdserve.kernels import (
    KernelError,
    QuantizedWeight,
    dequantize,
    quantize,
    quantized_linear,
    sort_groups,
)
from pdserve.kernels.quantized_weight import pack, unpack

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ["int8", "fp8", "awq", "gptq", "gptq_v2"]


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    distance = (actual.double() - expected).norm() / expected.norm().clamp(1e-30)
    return float(distance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "width", "columns", "group"),
    [(0, 8, 32, 32), (1, 8, 64, 32), (17, 40, 128, 128), (63, 72, 344, -1), (500, 24, 160, 64)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_float64(
    kind: str, rows: int, width: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    weight, matrix = random_weight(kind, width, columns, group)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(width).to(dtype)
    for given in (None, bias):
        expected = x.double() @ matrix.t() + (0 if given is None else given.double())
        actual = quantized_linear(x, weight, given)
        assert actual.dtype == dtype
        assert error_of(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (64, -1), (80, 32), (24, 16)])
def test_the_matrix_is_the_one_that_was_packed(kind: str, columns: int, group: int) -> None:
    weight, matrix = random_weight(kind, 16, columns, group)
    assert error_of(dequantize(weight), matrix) < 1e-6
    assert weight.rows == 16


@pytest.mark.parametrize("packing", ["awq", "gptq"])
def test_unpacking_undoes_packing(packing: Any) -> None:
    values = torch.randint(0, 16, (24, 15))
    assert torch.equal(unpack(pack(values, packing), packing).long(), values)


@pytest.mark.parametrize("group", [16, 32])
def test_scattered_groups_are_brought_together(group: int) -> None:
    made = random_nibbles(24, 80, group, scattered=True)
    tensors = made.gptq()
    values, order = sort_groups(tensors["qweight"], tensors["g_idx"], group)
    weight = QuantizedWeight(
        packing="gptq",
        values=values,
        zeros=tensors["qzeros"],
        scales=tensors["scales"],
        group=group,
        columns=80,
        zero_offset=1,
        order=order,
    )
    x = torch.randn(3, 80)
    assert error_of(quantized_linear(x, weight), x.double() @ made.matrix.t()) < 1e-5
    assert error_of(dequantize(weight), made.matrix) < 1e-6


def test_groups_in_order_are_left_where_they_are() -> None:
    tensors = random_nibbles(8, 64, 32).gptq()
    values, order = sort_groups(tensors["qweight"], tensors["g_idx"], 32)
    assert values is tensors["qweight"]
    assert order is None


def test_groups_of_other_sizes_cannot_be_brought_together() -> None:
    tensors = random_nibbles(8, 64, 32).gptq()
    tensors["g_idx"][0] = 1
    with pytest.raises(KernelError, match="Every group must have 32 inputs, but group 1 has more"):
        sort_groups(tensors["qweight"], tensors["g_idx"], 32)


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.012), ("fp8", 0.03)])
def test_quantising_keeps_what_the_format_can(kind: Any, tolerance: float) -> None:
    matrix = torch.randn(33, 500) * torch.logspace(-6, 3, 33).unsqueeze(1)
    matrix[5] = 0
    weight = quantize(matrix, kind)
    back = dequantize(weight)
    assert torch.equal(back[5], matrix[5])
    for row in (0, 1, 17, 32):
        assert error_of(back[row], matrix[row].double()) < tolerance
    assert weight.nbytes < matrix.nbytes / 3.8
    assert torch.equal(dequantize(quantize(matrix.bfloat16(), kind))[5], matrix[5])


def test_every_byte_of_e4m3_means_what_torch_says() -> None:
    numbers = torch.arange(256).to(torch.uint8)
    values = numbers[(numbers & 0x7F) != 0x7F].view(torch.float8_e4m3fn).view(-1, 1).clone()
    count = values.shape[0]
    weight = QuantizedWeight(
        packing="bytes", values=values, scales=torch.ones(1, count), group=1, columns=1
    )
    assert torch.equal(dequantize(weight), values.float())


def fields(**changes: Any) -> dict[str, Any]:
    weight, _ = random_weight("awq", 16, 64, 32)
    given = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "marlin"}, "packing must be bytes, awq or gptq, not 'marlin'"),
        ({"packing": "gptq"}, r"values must have the shape \[8, 16\], not \[64, 2\]"),
        ({"packing": "bytes"}, "values must be int8 or float8_e4m3fn, not int32"),
        ({"zeros": None}, "packing awq needs zeros"),
        ({"zeros": torch.zeros(2, 2)}, "zeros must be int32, not float32"),
        ({"zeros": torch.zeros(2, 3).int()}, r"zeros must have the shape \[2, 2\]"),
        ({"values": torch.zeros(64, 2)}, "values must be int32, not float32"),
        ({"scales": torch.zeros(2, 16).int()}, "scales must be float32 or bfloat16 or float16"),
        ({"scales": torch.zeros(2, 12)}, "need a multiple of 8 outputs, not 12"),
        ({"scales": torch.zeros(16, 2).t()}, "scales must be contiguous"),
        ({"scales": torch.zeros(2, 16, device="meta")}, "scales is on meta but values is on cpu"),
        ({"group": 48}, "group must be a power of two from 16 on, or all 64 columns; not 48"),
        ({"group": 0}, "group must be a power of two"),
        ({"group": 16}, "scales has 2 groups, but 64 columns in groups of 16 make 4"),
        ({"order": torch.zeros(63).long()}, r"order must have the shape \[64\]"),
        ({"order": torch.zeros(64)}, "order must be int64, not float32"),
    ],
    ids=str,
)
def test_a_weight_that_does_not_fit_together_is_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KernelError, match=sentence):
        QuantizedWeight(**fields(**changes))


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    weight = QuantizedWeight(**fields())
    x = torch.zeros(2, 64)
    with pytest.raises(KernelError, match=r"x must have the shape \[any, 64\], not \[2, 63\]"):
        quantized_linear(x[:, 1:], weight)
    with pytest.raises(KernelError, match="x must be float32 or bfloat16 or float16, not float64"):
        quantized_linear(x.double(), weight)
    with pytest.raises(KernelError, match="x is on meta but weight.values is on cpu"):
        quantized_linear(x.to("meta"), weight)
    with pytest.raises(KernelError, match=r"bias must have the shape \[16\], not \[17\]"):
        quantized_linear(x, weight, torch.zeros(17))
    with pytest.raises(KernelError, match="bias is float16 but x is float32"):
        quantized_linear(x, weight, torch.zeros(16).half())
    with pytest.raises(KernelError, match="dtype must be float32, float16 or bfloat16, not float6"):
        dequantize(weight, torch.float64)
    with pytest.raises(KernelError, match="weight must be float32 or bfloat16 or float16, not int"):
        quantize(torch.zeros(2, 3).char(), "int8")
