"""Writing into the paged cache and moving blocks: copies, so every comparison is exact."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.kernels import (
    KernelError,
    gather_blocks,
    rope,
    rope_and_store_kv,
    scatter_blocks,
    store_kv,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tokens", [0, 1, 17, 63])
def test_store_kv_writes_its_slots_and_nothing_else(dtype: torch.dtype, tokens: int) -> None:
    pool = torch.full((30, 3, 2, 5, 2, 8), 7.0, dtype=dtype)
    key, value = torch.randn(2, tokens, 2, 8).to(dtype)
    slots = torch.randperm(30 * 5)[:tokens]
    store_kv(key, value, pool[:, 1], slots)
    expected = torch.full_like(pool, 7.0)
    for row, slot in enumerate(slots.tolist()):
        expected[slot // 5, 1, 0, slot % 5] = key[row]
        expected[slot // 5, 1, 1, slot % 5] = value[row]
    assert torch.equal(pool, expected)


def test_the_fused_pass_equals_its_parts() -> None:
    query, key, value = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    cos, sin = torch.randn(2, 6, 4)
    slots = torch.randperm(12)[:6]
    fused, parts = torch.zeros(2, 3, 2, 4, 2, 8)[None].transpose(0, 1).squeeze(1)
    turned = rope_and_store_kv(query, key, value, cos, sin, fused, slots)
    store_kv(rope(key, cos, sin), value, parts, slots)
    assert torch.equal(turned, rope(query, cos, sin))
    assert torch.equal(fused, parts)
    assert fused.count_nonzero() == 6 * 2 * 2 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ids", [[], [4], [9, 0, 3], list(range(10))])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_blocks_go_out_and_come_back(
    dtype: torch.dtype, ids: list[int], index_dtype: torch.dtype
) -> None:
    pool = torch.randn(10, 3, 2, 5, 2, 8).to(dtype)
    block_ids = torch.tensor(ids, dtype=index_dtype)
    gathered = gather_blocks(pool, block_ids)
    assert gathered.is_contiguous()
    assert [block.tolist() for block in gathered] == [pool[block].tolist() for block in ids]
    into = torch.empty_like(gathered)
    gather_blocks(pool, block_ids, out=into)
    assert torch.equal(into, gathered)
    other = torch.full_like(pool, math.nan)
    scatter_blocks(gathered, other, block_ids)
    for block in range(10):
        assert torch.equal(other[block], pool[block]) == (block in ids)
        assert other[block].isnan().all() == (block not in ids)


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    cache, key = torch.zeros(2, 2, 4, 1, 8), torch.zeros(3, 1, 8)
    with pytest.raises(KernelError, match="slots must be int64, not int32"):
        store_kv(key, key, cache, torch.arange(3, dtype=torch.int32))
    with pytest.raises(KernelError, match=r"slots must have the shape \[3\]"):
        store_kv(key, key, cache, torch.arange(2))
    with pytest.raises(KernelError, match="slots must be contiguous, not 2 elements apart"):
        store_kv(key, key, cache, torch.arange(6)[::2])
    with pytest.raises(KernelError, match="block_ids must be contiguous, not 2 elements apart"):
        gather_blocks(cache, torch.tensor([0, 7, 1])[::2])
    with pytest.raises(KernelError, match=r"value must have the shape \[3, 1, 8\]"):
        store_kv(key, key[:2], cache, torch.arange(3))
    with pytest.raises(KernelError, match="key is bfloat16 but cache is float32"):
        store_kv(key.bfloat16(), key.bfloat16(), cache, torch.arange(3))
    with pytest.raises(KernelError, match="buffer must have the shape"):
        scatter_blocks(torch.zeros(2, 2, 4, 1, 8), cache, torch.tensor([0]))
    with pytest.raises(KernelError, match="out is float16 but pool is float32"):
        gather_blocks(cache, torch.tensor([0]), torch.zeros(1, 2, 4, 1, 8).half())
