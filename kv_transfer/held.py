"""One ticket in the outbox: its blocks, who reads them, and where it stands."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.protocol.errors import PdserveError
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import Fetch


class TicketState(enum.Enum):
    GROWING = enum.auto()
    READY = enum.auto()
    SENDING = enum.auto()
    ENDING = enum.auto()
    RETURNED = enum.auto()


class Ending(enum.StrEnum):
    """Why a ticket's blocks went back to the pool."""

    COMMITTED = "committed"
    FAILED = "failed"
    ABORTED = "aborted"
    """These three are the fetching side's word (`Outcome`)."""
    WITHDRAWN = "withdrawn"
    """The own engine's: the request was aborted here, or preempted while its ticket grew."""
    EXPIRED = "expired"
    FENCED = "fenced"
    """The worker's epoch is over."""
    CLOSED = "closed"
    """The transfer was shut down."""


class Refusal(PdserveError):
    """A fetch that the outbox does not allow; `str()` is the sentence for the reader."""


@dataclass(slots=True, eq=False)
class Held:
    """Changed under the outbox's lock alone."""

    ticket: KVTicket
    block_ids: tuple[int, ...]
    deadline: float
    growing: bool = False
    """The engine still computes: it alone ends the ticket, and nothing is returned."""
    readers: int = 0
    ending: Ending | None = None
    checksums: dict[int, int] = field(default_factory=dict)

    @property
    def state(self) -> TicketState:
        if self.ending is not None:
            busy = self.readers or self.growing
            return TicketState.ENDING if busy else TicketState.RETURNED
        if self.growing:
            return TicketState.GROWING
        return TicketState.SENDING if self.readers else TicketState.READY


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A reader's right to look at some of a ticket's blocks until it is given to `Outbox.end`."""

    held: Held
    wanted: tuple[int, ...]
    early: bool = False
    """Begun while the ticket was growing."""

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Block numbers in the pool, in the order of `wanted`."""
        return tuple(self.held.block_ids[index] for index in self.wanted)

    @property
    def stopped(self) -> bool:
        """Whether to stop early: nobody wants the blocks any more and the pool wants them back."""
        return self.held.ending in (Ending.WITHDRAWN, Ending.FENCED, Ending.CLOSED)

    def checksums(self, compute: Callable[[int], int]) -> tuple[int, ...]:
        """Of the wanted blocks, in order; `compute(block number)` only for blocks not yet asked.
        Two readers may compute the same one at once: they get the same number."""
        known = self.held.checksums
        for index in self.wanted:
            if index not in known:
                known[index] = compute(self.held.block_ids[index])
        return tuple(known[index] for index in self.wanted)


def check_blocks(ticket: KVTicket, blocks: Sequence[int], whole: bool) -> None:
    """Raises ValueError for blocks that cannot be the ticket's: all of them, or its first."""
    missing = ticket.num_blocks - len(blocks)
    if missing < 0 or (whole and missing):
        size = ticket.fingerprint.block_size
        raise ValueError(
            f"{ticket.num_tokens} tokens in blocks of {size} do not fill {len(blocks)} blocks."
        )
    if len(set(blocks)) != len(blocks):
        raise ValueError("A block was offered twice in one ticket.")


def check_wanted(fetch: Fetch, ticket: KVTicket, ready: int) -> None:
    """Raises Refusal for indices that are out of order, outside, or not computed yet: of the
    ticket's blocks the first `ready` are there."""
    if fetch.request_id != ticket.request_id:
        raise Refusal(f"The ticket {ticket.ticket_id} belongs to another request.")
    count = ticket.num_blocks
    if fetch.parcels is not None:
        size, complete = max(1, fetch.parcels.block_size), ready == count
        count = -(-ticket.num_tokens // size)
        ready = count if complete else ready * ticket.fingerprint.block_size // size
    previous = -1
    for index in fetch.wanted:
        if index <= previous or index >= count:
            raise Refusal(
                f"The wanted blocks must be ascending and below {count}. "
                f"Given: {index} after {previous}."
            )
        if index >= ready:
            raise Refusal(f"Block {index} is still to be computed; {ready} are ready.")
        previous = index
    if not fetch.wanted:
        raise Refusal("A fetch must want at least one block.")
