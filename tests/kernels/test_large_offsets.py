"""Pools, caches and logits of more than 2³¹ elements: every kernel's offsets have 64 bits.

The memory is virtual: pages that nobody touches do not exist, and few are touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdserve import kernels

BLOCK = (2, 2, 16, 2, 64)
"""Layers, K and V, tokens, heads, head size: 8,192 elements."""
FAR = 2**31 // 8192 + 7
"""The number of a block whose elements lie beyond 2³¹."""
NEAR = 3

pytestmark = pytest.mark.usefixtures("implementation")


def virtual(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written (calloc), nor when they are read."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8)).view(dtype).view(shape)


def far_rows(rows: int, width: int) -> torch.Tensor:
    """[rows, width] float32 whose rows are 2³¹ elements apart."""
    flat = virtual((rows - 1) * 2**31 + width, dtype=torch.float32)
    return flat.as_strided((rows, width), (2**31, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_is_stored_far_away_is_attended_to(dtype: torch.dtype) -> None:
    """In both of a pool's ends the same, so that the results must be equal."""
    cache = virtual(FAR + 1, *BLOCK, dtype=dtype)[:, 1]
    key, value = torch.randn(2, 16, 2, 64).half()
    for block in (FAR, NEAR):
        kernels.store_kv(key, value, cache, torch.arange(16) + 16 * block)
    assert torch.equal(cache[FAR].float(), cache[NEAR].float())
    assert cache[FAR].float().abs().sum() > 0
    cos, sin = torch.randn(2, 16, 32)
    slots = torch.arange(16) + 16 * (FAR - 1)
    turned = kernels.rope_and_store_kv(key, key, value, cos, sin, cache, slots)
    if dtype == torch.float16:
        assert torch.equal(cache[FAR - 1, 0], turned)
    query = torch.randn(1, 4, 64).half()
    lens, options = torch.tensor([13]), {"scale": 0.3}
    near, far = (torch.tensor([[block]]) for block in (NEAR, FAR))
    expected = kernels.attention_decode(query, cache, lens, near, **options)
    assert expected.abs().sum() > 0
    assert torch.equal(kernels.attention_decode(query, cache, lens, far, **options), expected)
    starts = torch.tensor([0, 1])
    expected = kernels.attention_prefill(query, cache, starts, lens, near, **options)
    assert torch.equal(
        kernels.attention_prefill(query, cache, starts, lens, far, **options), expected
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"heads": (1, 1)}, {"block_size": 8}, {"wire": "int8"}, {"wire": "fp8"}],
    ids=str,
)
def test_blocks_far_away_come_and_go(how: dict[str, Any]) -> None:
    pool = virtual(FAR + 2, *BLOCK, dtype=torch.float16)
    pool[[NEAR, FAR]] = torch.randn(BLOCK).half()
    ids = torch.tensor([FAR, NEAR])
    buffer = kernels.gather_blocks(pool, ids, **how)
    half = buffer.shape[0] // 2
    assert buffer[:half].float().abs().sum() > 0
    back = ids[:1] + 1
    kernels.scatter_blocks(buffer[:half], pool, back, **how)
    again = kernels.gather_blocks(pool, back, **how)
    if "wire" in how:
        near = pool[FAR].abs().max().item() / 10
        torch.testing.assert_close(pool[FAR + 1], pool[FAR], rtol=0, atol=near)
    else:
        assert torch.equal(again, buffer[half:])


def test_rows_of_logits_far_apart() -> None:
    logits = far_rows(2, 70)
    logits[1] = torch.randn(70)
    close = logits.clone()
    rows, tokens = torch.tensor([1, 1]), torch.tensor([3, 69])
    for some in (logits, close):
        kernels.apply_penalties(
            some,
            rows,
            tokens,
            torch.tensor([1, 2]),
            presence=torch.full((2,), 0.5),
            frequency=torch.full((2,), 0.25),
            repetition=torch.full((2,), 1.5),
        )
        kernels.apply_bitmask(some, torch.tensor([1]), torch.full((1, 3), 0x5A5A5A5A).int())
    assert torch.equal(logits, close)
    for found, expected in zip(
        kernels.log_probabilities(logits, torch.tensor([2, 4]), 3),
        kernels.log_probabilities(close, torch.tensor([2, 4]), 3),
        strict=True,
    ):
        assert torch.equal(found, expected)
    arguments = {
        "temperature": torch.ones(2),
        "top_k": torch.tensor([0, 9]),
        "top_p": torch.ones(2),
        "min_p": torch.zeros(2),
        "seeds": torch.tensor([5, 6]),
        "positions": torch.tensor([7, 8]),
    }
    assert torch.equal(kernels.sample(logits, **arguments), kernels.sample(close, **arguments))


def test_rows_of_products_far_apart() -> None:
    x = far_rows(2, 64)
    x[1] = torch.randn(64)
    close = x.clone()
    weight = far_rows(3, 64)
    weight[:] = torch.randn(3, 64)
    small = kernels.quantize(weight.contiguous(), "int8")
    held = kernels.expert_weights(
        [tuple(torch.randn(shape) for shape in ((8, 64), (8, 64), (64, 8))) for _ in range(2)]
    )
    chances, experts = torch.ones(2, 1), torch.tensor([[0], [1]])
    for operation in (
        lambda x: kernels.linear(x, weight, invariant=True),
        lambda x: kernels.quantized_linear(x, small),
        lambda x: kernels.mixture(x, chances, experts, held, "silu"),
        lambda x: kernels.route(x, 3, renormalise=True)[0],
    ):
        torch.testing.assert_close(operation(x), operation(close))
        assert operation(x)[1].abs().sum() > 0


def test_rows_of_activations_far_apart() -> None:
    x = far_rows(2, 64)
    x[1] = torch.randn(64)
    close, weight = x.clone(), torch.randn(64)
    for operation in (
        lambda x: kernels.rms_norm(x, weight, 1e-6),
        lambda x: kernels.silu_and_mul(x, x),
        lambda x: kernels.gelu_and_mul(x, x),
        lambda x: kernels.rope(x.unflatten(1, (2, 32)), torch.ones(2, 16), torch.ones(2, 16)),
    ):
        torch.testing.assert_close(operation(x), operation(close))  # vectorised otherwise
