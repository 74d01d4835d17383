"""Checksums of blocks on a device: the reference against plain integers, Triton against it."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels import KernelError, copy_blocks_summed, dispatch, sum_blocks
from pdserve.kernels.sums import C0, C1, C2, C3

triton = pytest.importorskip("triton")
MASK = 2**64 - 1


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    if request.param == "triton" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1.")
    monkeypatch.setenv(dispatch.ENVIRONMENT, request.param)
    dispatch.forget()
    yield
    dispatch.forget()


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64)


def expected(words: list[int]) -> int:
    """The definition, in Python's integers."""
    total = 0
    for index, word in enumerate(words):
        mixed = (word & MASK) ^ ((C0 + C1 * index) & MASK)
        mixed = (mixed ^ mixed >> 32) * C2 & MASK
        total += (mixed ^ mixed >> 32) * C3 * (2 * index + 1)
    return total & MASK


@pytest.mark.parametrize("words", [1, 7, 2048, 2049, 5000])
def test_sums_are_as_defined(words: int) -> None:
    pool = noise(4, words)
    sums = sum_blocks(pool, torch.tensor([3, 0, 0]))
    wanted = [expected(pool[block].tolist()) for block in (3, 0, 0)]
    assert [value & MASK for value in sums.tolist()] == wanted
    assert sum_blocks(pool, torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("words", [1, 100, 4097])
def test_copies_carry_their_sums(words: int) -> None:
    source, target = noise(5, words), noise(6, words)
    before = target.clone()
    sums = copy_blocks_summed(source, torch.tensor([4, 1]), target, torch.tensor([0, 5]))
    assert torch.equal(target[[0, 5]], source[[4, 1]])
    assert torch.equal(target[1:5], before[1:5])
    assert torch.equal(sums, sum_blocks(target, torch.tensor([0, 5])))


def test_every_bit_and_the_order_count() -> None:
    block = noise(1, 50)
    variants = block.repeat(66, 1)
    for bit in range(64):
        variants[bit, 20] ^= -(2**63) if bit == 63 else 1 << bit
    variants[64, [3, 4]] = block[0, [4, 3]]
    variants[65, [7, 8]] ^= -(2**63)  # the highest bit of two words, which a plain sum loses
    sums = sum_blocks(torch.cat([block, variants]), torch.arange(67)).tolist()
    assert len(set(sums)) == 67


def test_wrong_arguments_are_refused() -> None:
    pool, ids = noise(3, 4), torch.tensor([0])
    with pytest.raises(KernelError, match="pool"):
        sum_blocks(pool.int(), ids)
    with pytest.raises(KernelError, match="contiguous"):
        sum_blocks(noise(4, 3).t(), ids)
    with pytest.raises(KernelError, match="target_ids"):
        copy_blocks_summed(pool, ids, pool.clone(), torch.tensor([0, 1]))
    with pytest.raises(KernelError, match="target"):
        copy_blocks_summed(pool, ids, noise(3, 5), ids)
    with pytest.raises(KernelError, match="block_ids is on meta but pool is on cpu"):
        sum_blocks(pool, ids.to("meta"))
    with pytest.raises(KernelError, match="source_ids is on meta but target is on cpu"):
        copy_blocks_summed(pool, ids.to("meta"), pool.clone(), ids)
    with pytest.raises(KernelError, match="block_ids must be contiguous, not 2 elements apart"):
        sum_blocks(pool, torch.tensor([0, 1, 2])[::2])
