"""One ticket in the outbox: its blocks, who reads them, and where it stands."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.memory import ascending
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.ticket import KVTicket, LeaseMark
from pdserve.protocol.transfer import Fetch, Progress


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
    ahead: tuple[int, ...] = ()
    """Blocks after these whose first slices are ready: as many as `slices` says."""
    slices: int = 0
    readers: int = 0
    ending: Ending | None = None
    mark: LeaseMark | None = None
    """Seen by readers on this host as long as it has not ended."""
    checksums: dict[str, dict[int, int]] = field(default_factory=dict)
    """Kind of checksum → index of the block → the number."""

    @property
    def progress(self) -> Progress:
        return Progress(blocks=len(self.block_ids), ahead=len(self.ahead), slices=self.slices)

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
    block_ids: tuple[int, ...] = ()
    """Numbers of the wanted blocks in the pool, in the order of `wanted`; of the wanted slices in
    a pool of slices. Empty for parcels, which are made out of all the ticket's blocks."""
    sliced: bool = False
    """Whether it is slices that are wanted."""
    early: bool = False
    """Begun while the ticket was growing."""

    @property
    def stopped(self) -> bool:
        """Whether to stop early: nobody wants the blocks any more and the pool wants them back."""
        return self.held.ending in (Ending.WITHDRAWN, Ending.FENCED, Ending.CLOSED)

    def checksums(self, kind: str, compute: Callable[[Sequence[int]], Sums]) -> tuple[int, ...]:
        """Of the wanted blocks, in order; `compute(block numbers)` only for blocks not yet asked.
        Two readers may compute the same one at once: they get the same number. Slices are asked
        for once as a rule, so theirs are not kept."""
        known = {} if self.sliced else self.held.checksums.setdefault(kind, {})
        if not known.keys() >= set(self.wanted):
            pairs = zip(self.wanted, self.block_ids, strict=True)
            fresh = [(index, block) for index, block in pairs if index not in known]
            sums = compute([block for _, block in fresh]).tolist()
            known.update(zip((index for index, _ in fresh), sums, strict=True))
        return tuple(map(known.__getitem__, self.wanted))


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


def check_wanted(fetch: Fetch, held: Held) -> None:
    """Raises Refusal for indices that are out of order, outside, or not computed yet."""
    ticket, ready = held.ticket, held.progress
    if fetch.request_id != ticket.request_id:
        raise Refusal(f"The ticket {ticket.ticket_id} belongs to another request.")
    if fetch.slices != 1 and (fetch.slices != ticket.slices or fetch.parcels is not None):
        raise Refusal(
            f"The ticket's blocks have {ticket.slices} slices, and parcels none. "
            f"Given: {fetch.slices}."
        )
    count = ticket.num_blocks * fetch.slices
    if fetch.parcels is not None:
        size, complete = max(1, fetch.parcels.block_size), ready.blocks == count
        count = -(-ticket.num_tokens // size)
        whole = count if complete else ready.blocks * ticket.fingerprint.block_size // size
        ready = Progress(blocks=whole)
    if not fetch.wanted:
        raise Refusal("A fetch must want at least one block.")
    if not (ascending(fetch.wanted) and 0 <= fetch.wanted[0] <= fetch.wanted[-1] < count):
        raise Refusal(
            f"The wanted blocks must be ascending, from 0 on and below {count}. Given: "
            f"{_shown(fetch.wanted)}."
        )
    if fetch.wanted[-1] < ready.blocks * fetch.slices:
        return
    for index in fetch.wanted:
        if not ready.has(index, fetch.slices):
            block = index // fetch.slices
            raise Refusal(f"Block {block} is still to be computed; {ready.blocks} are ready.")


def _shown(numbers: Sequence[int]) -> str:
    """The first ones."""
    first = ", ".join(map(str, numbers[:8]))
    return f"{first}, ..." if len(numbers) > 8 else first
