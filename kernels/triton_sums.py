"""Checksums of blocks, and copies that carry them, in Triton; see `pdserve.kernels.sums`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.sums import C0, C1, C2, C3

BLOCK = 2048
"""Words per program."""


def sum_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """See `pdserve.kernels.sums.sum_blocks`."""
    return _launch(pool, block_ids, pool, block_ids, copies=False)


def copy_blocks_summed(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> torch.Tensor:
    """See `pdserve.kernels.sums.copy_blocks_summed`."""
    return _launch(source, source_ids, target, target_ids, copies=True)


def _launch(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    copies: bool,
) -> torch.Tensor:
    count, words = source_ids.shape[0], source.shape[1]
    sums = torch.zeros(count, dtype=torch.int64, device=target.device)
    if count:
        summing_kernel[(count, triton.cdiv(words, BLOCK))](
            source,
            source_ids,
            target,
            target_ids,
            sums,
            words,
            C0=C0,
            C1=C1,
            C2=C2,
            C3=C3,
            COPIES=copies,
            BLOCK=BLOCK,
        )
    return sums


@triton.jit(do_not_specialize_on_alignment=["source_id_ptr", "target_id_ptr"])
def summing_kernel(
    source_ptr,
    source_id_ptr,
    target_ptr,
    target_id_ptr,
    total_ptr,
    words,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program takes BLOCK words of one block."""
    block = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < words
    there = tl.load(source_id_ptr + block)
    word = tl.load(source_ptr + there * words + index, mask=inside, other=0)
    if COPIES:
        here = tl.load(target_id_ptr + block)
        tl.store(target_ptr + here * words + index, word, mask=inside)
    mixed = fold(fold(word ^ (index * C1 + C0)) * C2) * ((2 * index + 1) * C3)
    tl.atomic_add(total_ptr + block, tl.sum(tl.where(inside, mixed, 0), 0))


@triton.jit
def fold(x):
    return x ^ ((x >> 32) & 0xFFFFFFFF)
