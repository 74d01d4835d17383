"""How blocks are cut into words that are copied without regard to what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one block is cut into rows of words; the same on both sides but for the block size.

    A block is [lots, size, width] words in the pool, of which the columns [first, first + taken)
    travel; in the buffer it is [lots, other, taken].
    """

    word_nbytes: int
    lots: int
    size: int
    other: int
    width: int
    first: int
    taken: int


def geometry(
    pool: torch.Tensor,
    buffer: torch.Tensor,
    heads: tuple[int, int] | None,
    words: Sequence[int],
) -> Geometry:
    """In the widest of `words` (bytes, 1 among them) that the blocks of both sides allow."""
    item = pool.element_size()
    if heads is None and pool.shape[1:] == buffer.shape[1:]:
        nbytes = pool[0].numel() * item if pool.shape[0] else 0
        lots, size, other, width, first, taken = 1, 1, 1, nbytes, 0, nbytes
    else:
        _, layers, kinds, size, kv_heads, dim = pool.shape
        begin, count = heads or (0, kv_heads)
        lots, other = layers * kinds, buffer.shape[3]
        width, first, taken = kv_heads * dim * item, begin * dim * item, count * dim * item
    offsets = (width, first, taken, pool.data_ptr(), buffer.data_ptr())
    step = max(nbytes for nbytes in words if all(part % nbytes == 0 for part in offsets))
    return Geometry(step, lots, size, other, width // step, first // step, taken // step)
