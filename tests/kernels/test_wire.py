"""Packed blocks: the stated error, the layout, what arrives whatever the other side's shape is."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.kernels import KernelError, dispatch, gather_blocks, scatter_blocks, wire

FORMATS = pytest.mark.parametrize("form", ["int8", "fp8"])
POOLS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def values(*shape: int) -> torch.Tensor:
    """Of very different sizes, with outliers."""
    return torch.randn(*shape) * 10.0 ** torch.randint(-4, 4, (*shape[:-1], 1))


@FORMATS
@pytest.mark.parametrize("target", POOLS, ids=str)
@pytest.mark.parametrize("source", POOLS, ids=str)
def test_the_error_is_within_its_bound(
    implementation: str, form: str, source: torch.dtype, target: torch.dtype
) -> None:
    if implementation == "triton" and torch.bfloat16 in (source, target) and source != target:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding; one pair is enough")
    pool = values(9, 2, 2, 5, 3, 24).to(source)
    ids = torch.tensor([7, 0, 3])
    packed = gather_blocks(pool, ids, wire=form)
    arrived = torch.full((9, 2, 2, 5, 3, 24), 7.0, dtype=target)
    scatter_blocks(packed, arrived, ids, wire=form)
    x, back = pool[ids].double(), arrived[ids].double()
    scale = x.abs().amax(-1, keepdim=True) / (127 if form == "int8" else 448)
    bound = scale / 2 if form == "int8" else torch.maximum(x.abs() / 16, scale / 1024)
    slack = 2 * ROUNDING[target] * x.abs() + scale * 1e-4 + 1e-7
    assert ((x - back).abs() <= bound + slack).all()
    assert (arrived[[1, 2, 4, 5, 6, 8]] == 7.0).all()


@FORMATS
def test_both_implementations_pack_the_same_bytes(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    pool = values(6, 1, 2, 4, 2, 20)
    pool[2, 0, 0, 1] = 0.0
    ids = torch.tensor([5, 2])
    packed = []
    for word in ("reference", "triton"):
        monkeypatch.setenv(dispatch.ENVIRONMENT, word)
        dispatch.forget()
        data, scales = wire.sections(gather_blocks(pool, ids, wire=form), pool.shape[1:], form)
        packed.append((data.view(torch.uint8).clone(), scales.clone()))
    dispatch.forget()
    assert torch.equal(packed[0][1], packed[1][1])
    assert torch.equal(packed[0][0], packed[1][0])


@FORMATS
@pytest.mark.parametrize("heads", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("block_size", [None, 3, 7])
def test_what_arrives_does_not_depend_on_how_it_was_cut(
    implementation: str, form: str, heads: tuple[int, int] | None, block_size: int | None
) -> None:
    pool = values(7, 2, 2, 4, 3, 8)
    ids = torch.tensor([5, 1, 6])
    first, count = heads or (0, 3)
    plain, cut = torch.full_like(pool, 7.0), torch.full_like(pool, 7.0)
    scatter_blocks(gather_blocks(pool, ids, wire=form), plain, ids, wire=form)
    packed = gather_blocks(pool, ids, heads=heads, block_size=block_size, wire=form)
    size = block_size or 4
    assert packed.shape == (-(-12 // size), wire.packed_nbytes([2, 2, size, count, 8]))
    scatter_blocks(packed, cut, ids, heads=heads, block_size=block_size, wire=form)
    kept = slice(first, first + count)
    assert torch.equal(cut[..., kept, :], plain[..., kept, :])
    rest = [head for head in range(3) if not first <= head < first + count]
    assert (cut[..., rest, :] == 7.0).all()


@FORMATS
def test_zeros_stay_zeros_and_broken_vectors_stay_broken(implementation: str, form: str) -> None:
    pool = torch.randn(2, 1, 2, 3, 2, 8)
    pool[0, 0, 0, 0, 0] = 0.0
    pool[0, 0, 0, 1, 0, 3] = math.nan
    pool[0, 0, 1, 2, 1, 5] = -math.inf
    pool[0, 0, 1, 0, 0] = 1e-45  # below what a scale can say
    ids = torch.tensor([0])
    arrived = torch.zeros_like(pool)
    scatter_blocks(gather_blocks(pool, ids, wire=form), arrived, ids, wire=form)
    assert (arrived[0, 0, 0, 0, 0] == 0).all()
    assert (arrived[0, 0, 1, 0, 0].abs() <= 1e-44).all()
    broken = arrived[0].isnan().all(-1)
    assert broken.sum() == 2
    assert broken[0, 0, 1, 0]
    assert broken[0, 1, 2, 1]
    assert not arrived[0][~broken].isnan().any()


def test_the_layout_is_what_the_docstring_says() -> None:
    pool = torch.randn(3, 1, 2, 1, 3, 5)
    packed = gather_blocks(pool, torch.tensor([2]), wire="int8")
    assert packed.shape == (1, 32 + 32)  # 30 elements, 6 scales
    scales = packed[0, 32:56].view(torch.float32).view(1, 2, 1, 3)
    torch.testing.assert_close(scales, pool[2].abs().amax(-1) / 127)
    data = packed[0, :30].view(torch.int8).view(1, 2, 1, 3, 5)
    torch.testing.assert_close(data * scales.unsqueeze(-1), pool[2], rtol=0, atol=0.02)


@FORMATS
def test_nothing_to_pack_is_nothing(implementation: str, form: str) -> None:
    pool, ids = torch.zeros(2, 1, 2, 3, 2, 8), torch.zeros(0, dtype=torch.int64)
    packed = gather_blocks(pool, ids, wire=form)
    assert packed.shape == (0, wire.packed_nbytes(pool.shape[1:]))
    scatter_blocks(packed, pool, ids, wire=form)


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    pool, ids = torch.zeros(2, 1, 2, 3, 2, 8), torch.tensor([0])
    with pytest.raises(KernelError, match="wire must be None, 'int8' or 'fp8', not 'int4'"):
        gather_blocks(pool, ids, wire="int4")
    with pytest.raises(KernelError, match=r"out must have the shape \[1, 144\]"):
        gather_blocks(pool, ids, torch.zeros(1, 96, dtype=torch.uint8), wire="int8")
    with pytest.raises(KernelError, match="buffer must be uint8, not int8"):
        scatter_blocks(torch.zeros(1, 144, dtype=torch.int8), pool, ids, wire="int8")
    with pytest.raises(KernelError, match="must be contiguous and begin at a multiple of 16"):
        odd = torch.zeros(145, dtype=torch.uint8)[1:].view(1, 144)
        scatter_blocks(odd, pool, ids, wire="fp8")
    with pytest.raises(KernelError, match="pool must be float32 or bfloat16 or float16"):
        gather_blocks(pool.to(torch.float8_e4m3fn), ids, wire="fp8")
