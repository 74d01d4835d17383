"""Checksums of blocks on the device where they lie, alone or of what is being copied.

A block is W words w_j of 64 bits. Its sum, modulo 2⁶⁴ and with odd C2 and C3, is

    Σ_j C3 (2j + 1) · fold(C2 · fold(w_j XOR (C0 + C1 · j))),    fold(x) = x XOR (x >> 32)

For each j that is a bijection of w_j, so any change of one word is seen; a change of several, or
words in another order, goes unseen by chance only, about once in 2⁶⁴ times (not from somebody who
wants that). Integers add up to the same in any order, so the sum does not depend on
how the work is divided.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch


def signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


C0, C1 = signed(0x9E3779B97F4A7C15), signed(0xBF58476D1CE4E5B9)
C2, C3 = signed(0x94D049BB133111EB), signed(0xD6E8FEB86659FD93)


def sum_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """The sum of each block: [n] int64 (the bits of an unsigned number).

    pool: [N, W] int64, contiguous; block_ids: [n] int64, each below N.
    """
    _check("pool", pool)
    _check_ids("block_ids", block_ids)
    checks.same_device("block_ids", block_ids, "pool", pool)
    fast = dispatch.implementation("sum_blocks", pool)
    if fast is not None:
        sums: torch.Tensor = fast(pool, block_ids)
        return sums
    return _sums(pool.index_select(0, block_ids))


def copy_blocks_summed(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> torch.Tensor:
    """target[target_ids[i]] = source[source_ids[i]]; returns the sums of what was stored, as
    `sum_blocks`. One reading of the source, which may be another process' or device's memory.

    source: [N, W], target: [M, W] int64, contiguous; ids: [n] int64, below N and M; no target
    twice.
    """
    _check("source", source)
    _check("target", target)
    _check_ids("source_ids", source_ids)
    checks.shape("target_ids", target_ids, [source_ids.shape[0]])
    checks.shape("target", target, [None, source.shape[1]])
    _check_ids("target_ids", target_ids)
    for name, ids in (("source_ids", source_ids), ("target_ids", target_ids)):
        checks.same_device(name, ids, "target", target)
    fast = dispatch.implementation("copy_blocks_summed", target)
    if fast is not None:
        sums: torch.Tensor = fast(source, source_ids, target, target_ids)
        return sums
    taken = source.index_select(0, source_ids)
    target.index_copy_(0, target_ids, taken)
    return _sums(taken)


def _sums(blocks: torch.Tensor) -> torch.Tensor:
    """[n, W] → [n]."""
    index = torch.arange(blocks.shape[1], dtype=torch.int64, device=blocks.device)
    mixed = _fold(_fold(blocks ^ (index * C1 + C0)) * C2)
    return (mixed * ((2 * index + 1) * C3)).sum(1)


def _fold(x: torch.Tensor) -> torch.Tensor:
    return x ^ ((x >> 32) & 0xFFFFFFFF)


def _check(name: str, pool: torch.Tensor) -> None:
    checks.shape(name, pool, [None, None])
    checks.dtype(name, pool, (torch.int64,))
    if not pool.is_contiguous():
        raise checks.KernelError(f"{name} must be contiguous, not {list(pool.stride())}.")


def _check_ids(name: str, ids: torch.Tensor) -> None:
    checks.shape(name, ids, [None])
    checks.dtype(name, ids, (torch.int64,))
