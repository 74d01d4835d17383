"""When a hand-over begins before its prompt is complete: two decisions over numbers.

Early on both sides is not better. The decode worker's blocks are taken while the prompt is still
being computed, and serve nobody meanwhile; the transfer is faster than the computation. So a ticket
goes out once half of the prompt is there, and a decode worker takes it in early only with room to
spare.
"""

from __future__ import annotations

SPARE = 4
"""A quarter of the blocks, and of the places of requests, is not for requests without a token."""


def offers_early(computed: int, known: int, block_size: int) -> bool:
    """Whether the ticket of a prompt goes out now: of its `known` tokens `computed` are there, at
    least half and a full block, but not all."""
    return block_size <= computed < known <= 2 * computed


def takes_early(available: int, needed: int, total: int, running: int, places: int) -> bool:
    """Whether a decode worker reserves `needed` blocks for a prompt that is still being computed:
    of its `total` blocks `available` can be had, of its `places` `running` are taken."""
    return available - needed >= total // SPARE and running + 1 <= places - places // SPARE
