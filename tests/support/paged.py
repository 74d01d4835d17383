"""A paged cache with chunks of prompts over it, for tests of kernels."""

from __future__ import annotations

import torch


def pool(
    chunks: list[tuple[int, int]], heads: tuple[int, int, int], block_size: int
) -> list[torch.Tensor]:
    """query, cache, query_start, context_lens, block_table; what nobody may read is NaN."""
    query_heads, kv_heads, dim = heads
    widths = [-(-context // block_size) for _, context in chunks]
    cache = torch.full((sum(widths) + 1, 2, block_size, kv_heads, dim), torch.nan)
    blocks = iter((torch.randperm(sum(widths)) + 1).tolist())
    table = torch.zeros(len(chunks), max(widths), dtype=torch.int64)
    for row, (_, context) in enumerate(chunks):
        for place in range(widths[row]):
            table[row, place] = block = next(blocks)
            used = min(block_size, context - place * block_size)
            cache[block, :, :used] = torch.randn(2, used, kv_heads, dim)
    counts = torch.tensor([0, *(count for count, _ in chunks)])
    query = torch.randn(int(counts.sum()), query_heads, dim)
    lens = torch.tensor([context for _, context in chunks])
    return [query.bfloat16(), cache.bfloat16(), counts.cumsum(0), lens, table]
