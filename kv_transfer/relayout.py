"""Carries out a plan of `layout.py` with torch: gather, convert if need be, scatter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.kernels import gather_blocks, scatter_blocks
from pdserve.kv_transfer.layout import Copy, Layout, LayoutError, Plan


def carry_out(plan: Plan, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy everything that the plan says.

    sources, targets: one pool per rank, [N, L, 2, S, heads of the rank, D] in the layout's dtype;
    all on one device. Raises LayoutError if a pool is not what its layout says.
    """
    _check("source", plan.source, sources)
    _check("target", plan.target, targets)
    for copy in plan.copies:
        source, target = sources[copy.source.rank], targets[copy.target.rank]
        if plan.whole_blocks:
            _whole_blocks(copy, source, target)
        else:
            _boxes(copy, source, target)


def _whole_blocks(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
    gathered = gather_blocks(source, _index(copy.source_blocks, source))
    scatter_blocks(gathered.to(target.dtype), target, _index(copy.target_blocks, target))


def _boxes(copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
    here, there = copy.source, copy.target
    cut = source[:, :, :, here.token : here.token + copy.tokens, here.head : here.head + copy.heads]
    place = target[
        :, :, :, there.token : there.token + copy.tokens, there.head : there.head + copy.heads
    ]
    gathered = cut.index_select(0, _index(copy.source_blocks, source))
    place.index_copy_(0, _index(copy.target_blocks, target), gathered.to(target.dtype))


def _index(blocks: Sequence[int], pool: torch.Tensor) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int64, device=pool.device)


def _check(side: str, layout: Layout, pools: Sequence[torch.Tensor]) -> None:
    if len(pools) != layout.tp_size:
        raise LayoutError(f"The {side} has {layout.tp_size} ranks. Given: {len(pools)} pools.")
    for pool in pools:
        wanted = layout.pool_shape(pool.shape[0])
        if tuple(pool.shape) != wanted or pool.dtype != getattr(torch, layout.dtype):
            raise LayoutError(
                f"A pool of the {side} must be {list(wanted)} in {layout.dtype}. Given: "
                f"{list(pool.shape)} in {pool.dtype}."
            )
