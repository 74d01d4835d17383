"""What `invariant` promises: a row has the same bits alone, in any batch and in any chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import dispatch, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
floats = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(params=["c", "reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The C kernels where they serve, torch alone, and Triton in its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        request.getfixturevalue("rows_alone")
        if request.getfixturevalue("dtype") == torch.bfloat16:
            pytest.skip("the interpreter computes bfloat16 products wrongly")
    if request.param == "c":
        monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    else:
        monkeypatch.setenv(dispatch.ENVIRONMENT, request.param)
    native.library.cache_clear()
    dispatch.forget()
    yield request.param
    native.library.cache_clear()
    dispatch.forget()


@floats
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(7, 33), (129, 352)])
def test_products(dtype: torch.dtype, rows: int, columns: int, biased: bool) -> None:
    weight = (torch.randn(rows, columns) / columns**0.5).to(dtype)
    bias = torch.randn(rows).to(dtype) if biased else None
    x = torch.randn(150, columns + 3).to(dtype)[:, 1:-2]
    whole = kernels.linear(x, weight, bias, invariant=True)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert not whole.isnan().any()
    assert (whole.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]
    for part in (slice(0, 1), slice(63, 64), slice(2, 9), slice(60, 131), slice(0, 0)):
        assert torch.equal(kernels.linear(x[part], weight, bias, invariant=True), whole[part])


@floats
@pytest.mark.parametrize("activation", kernels.GATES)
@pytest.mark.parametrize("width", [1, 1000])
def test_activations(dtype: torch.dtype, activation: str, width: int) -> None:
    gate, up = (torch.randn(2, 70, width) * 3).to(dtype)
    run = kernels.GATES[activation]
    whole = run(gate, up, invariant=True)
    torch.testing.assert_close(whole, run(gate, up))
    for part in (slice(0, 1), slice(33, 34), slice(2, 9), slice(1, 70), slice(0, 0)):
        assert torch.equal(run(gate[part], up[part], invariant=True), whole[part])


@floats
@pytest.mark.parametrize("width", [16, 24, 300])
def test_norms_and_rotations(dtype: torch.dtype, width: int) -> None:
    x, residual = (torch.randn(2, 50, 3, width) * 3).to(dtype)
    weight = torch.randn(width).to(dtype)
    cos, sin = torch.randn(2, 50, width // 2)
    normed = kernels.rms_norm(x, weight, 1e-6)
    added = kernels.fused_add_rms_norm(x, residual, weight, 1e-6)
    turned = kernels.rope(x, cos, sin)
    for part in (slice(0, 1), slice(33, 34), slice(2, 9), slice(1, 50)):
        assert torch.equal(kernels.rms_norm(x[part], weight, 1e-6), normed[part])
        both = kernels.fused_add_rms_norm(x[part], residual[part], weight, 1e-6)
        assert torch.equal(both[0], added[0][part]) and torch.equal(both[1], added[1][part])
        assert torch.equal(kernels.rope(x[part], cos[part], sin[part]), turned[part])


@floats
@pytest.mark.parametrize(("window", "cap"), [(None, None), (9, None), (70, 2.0)])
def test_attention_of_any_chunks(dtype: torch.dtype, window: int | None, cap: float | None) -> None:
    """150 tokens at once, in chunks, one by one, and beside other sequences and padding."""
    length, size = 150, 16
    cache = torch.randn(40, 2, size, 2, 32).to(dtype)
    table = torch.randperm(40)[:30].view(3, 10)
    query = torch.randn(length, 4, 32).to(dtype)
    options: dict[str, Any] = {"scale": 0.2, "window": window, "soft_cap": cap, "invariant": True}

    def chunk(first: int, last: int) -> torch.Tensor:
        return kernels.attention_prefill(
            query[first:last],
            cache,
            torch.tensor([0, last - first]),
            torch.tensor([last]),
            table[:1, : -(-last // size)],
            **options,
        )

    whole = chunk(0, length)
    plain = kernels.attention_prefill(
        query,
        cache,
        torch.tensor([0, length]),
        torch.tensor([length]),
        table[:1],
        **{**options, "invariant": False},
    )
    assert (whole - plain).float().norm() / plain.float().norm() < TOLERANCE[dtype]
    for first, last in ((0, 1), (0, 63), (63, 64), (64, 149), (149, 150), (17, 18)):
        assert torch.equal(chunk(first, last), whole[first:last])
    others = torch.randn(40, 4, 32).to(dtype)
    together = kernels.attention_prefill(
        torch.cat([others[:33], query[70:120], others[33:34]]),
        cache,
        torch.tensor([0, 33, 83, 84]),
        torch.tensor([90, 120, 0]),
        table[[1, 0, 2]],
        **options,
    )
    assert torch.equal(together[33:83], whole[70:120])
    assert together[83].count_nonzero() == 0
