"""When a hand-over begins before its prompt is complete: two decisions over numbers.

Blocks leave chunk by chunk and, within large chunks, some layers after the other. Early on both
sides is not better. The decode worker's blocks are taken while the prompt is still
being computed, and serve nobody meanwhile; the transfer is faster than the computation. So a ticket
goes out once half of the prompt is there, and a decode worker takes it in early only with room to
spare.
"""

from __future__ import annotations

SPARE = 4
"""A quarter of the blocks, and of the places of requests, is not for requests without a token."""


BY_LAYERS_BYTES = 8 * 2**20
"""A chunk whose KV is smaller travels in about the time of the messages that it would take to send
it slice by slice: it goes when it is complete."""


def offers_early(computed: int, known: int, block_size: int) -> bool:
    """Whether the ticket of a prompt goes out now: of its `known` tokens `computed` are there, at
    least half and a full block, but not all."""
    return block_size <= computed < known <= 2 * computed


def takes_early(available: int, needed: int, total: int, running: int, places: int) -> bool:
    """Whether a decode worker reserves `needed` blocks for a prompt that is still being computed:
    of its `total` blocks `available` can be had, of its `places` `running` are taken."""
    return available - needed >= total // SPARE and running + 1 <= places - places // SPARE
