"""Messages between a decode worker (which fetches) and a prefill worker (which holds)."""

from __future__ import annotations

import enum

import msgspec

from pdserve.protocol.ticket import LayoutFingerprint, LeaseMark

WATCH_S = 1.0
"""Longest a source lets a reader of a growing ticket wait for news."""


class Outcome(enum.StrEnum):
    """What became of a ticket, said by the side that fetched."""

    COMMITTED = "committed"
    FAILED = "failed"
    ABORTED = "aborted"


class Parcels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the reader wants the tokens cut, where it does not take the source's blocks as they are:
    parcel i holds tokens i · block_size and following, all layers, K and V, of some heads."""

    block_size: int
    first_head: int
    """Numbered in the whole model."""
    num_heads: int
    wire: str = ""
    """"int8" or "fp8": packed as `pdserve.kernels.wire` says; "": as stored."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of a growing ticket is ready."""

    blocks: int = 0
    """Whole blocks, from the first on."""
    ahead: int = 0
    """Blocks after them of which only the first layers are ready: those being computed."""
    slices: int = 0
    """How many slices of each of these."""

    def beyond(self, other: Progress) -> bool:
        return (self.blocks, self.slices) > (other.blocks, other.slices)

    def has(self, unit: int, slices: int) -> bool:
        """Whether slice `unit % slices` of block `unit // slices` is ready; with one slice per
        block, whether all of it is."""
        block, part = divmod(unit, slices)
        begun = slices > 1 and part < self.slices
        return block < self.blocks + (self.ahead if begun else 0)


class Fetch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fetch"):
    """Ask for the blocks of a ticket. `fingerprint` is compared before anything else."""

    ticket_id: str
    request_id: str
    epoch: int
    fingerprint: LayoutFingerprint
    transport: str
    """"tcp": the blocks follow on this connection; "shm": the reader maps the source's pool."""
    wanted: tuple[int, ...]
    """Indices into the ticket's blocks, or of parcels (0 = first of the prompt), ascending; the
    blocks that the fetching side already holds are left out. Of slices, if they are fetched by
    themselves: slice s of block i is i · slices + s."""
    host_id: str
    """Identity of the reader's host, for transports within one."""
    detail: str = ""
    """What else the transport needs to know. "nccl": NCCL version / session that is over.
    "ipc": PCI bus id of the reader's GPU."""
    parcels: Parcels | None = None
    """None: whole blocks, as they lie in the source's pool."""
    slices: int = 1
    """Slices per block (`KVTicket.slices`), if it is they that are wanted. What header and
    transports say of blocks is then said of slices, as if the pool had smaller blocks."""


class DevicePool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a pool lies in the memory of a GPU."""

    handle: bytes
    """CUDA's name for the allocation."""
    offset: int
    """Bytes from the allocation's begin to the pool's."""
    num_blocks: int
    bus_id: str
    """The GPU's PCI bus id."""


class Watch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="watch"):
    """Ask how far a growing ticket is. Answered once more than `have` is ready or all is, at the
    latest after WATCH_S."""

    ticket_id: str
    epoch: int
    have: Progress


class Grown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grown"):
    """The answer to `Watch`."""

    ticket_id: str
    ready: Progress
    """What can be fetched."""
    sealed: bool
    """This is all, and the lease has begun."""


class FetchHeader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="header"
):
    """The answer to `Fetch`. On "tcp" `num_blocks × block_nbytes` raw bytes follow, in order."""

    ticket_id: str
    epoch: int
    num_blocks: int
    block_nbytes: int
    checksums: tuple[int, ...]
    """xxh3-64 of each block, in the order of `wanted`; over "ipc" as `pdserve.kernels.sums`."""
    pool_path: str = ""
    """"shm": path under which the source's pool can be opened by this reader."""
    pool_blocks: tuple[int, ...] = ()
    """"shm", "ipc": block numbers in that pool, in the order of `wanted`."""
    pool_nonce: bytes = b""
    """"shm": must be equal to the pool's own, found at its end: proves that the path names it.
    "ipc": names the pool among those of this source."""
    pool_device: DevicePool | None = None
    """"ipc": where the pool lies."""
    mark: LeaseMark | None = None
    """Of the ticket, for a reader on the same host."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """The blocks will not come: unknown or expired ticket, other epoch, other layout."""

    ticket_id: str
    reason: str
    retry_other_transport: bool = False
    """True if only the transport was at fault."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ready"):
    """After the header, for "nccl": the source is about to send, in pieces, in this session."""

    session: bytes
    """The communicator's unique id; one that the reader does not have yet is to be joined."""
    blocks_per_send: int


class Joining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="joining"):
    """After `Ready`, for "nccl", from a reader that does not have the session yet: it joins now, so
    the source may too. Neither side enters a call that waits for the other without knowing."""

    session: bytes


class Renew(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="renew"):
    """Keep the ticket's blocks for another `lease_s` seconds."""

    ticket_id: str
    epoch: int


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="release"):
    """The fetching side is done with the ticket. Idempotent."""

    ticket_id: str
    epoch: int
    outcome: Outcome
    nbytes: int = 0
    """What it copied by itself, without a `Fetch`."""


class Released(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="released"
):
    """Answer to `Release` and `Renew`: whether the lease still stood at that moment.

    A reader of shared memory must not use what it copied unless `valid` is true, or it has seen
    the ticket's mark when its copy was complete."""

    ticket_id: str
    valid: bool


ToSource = Fetch | Watch | Renew | Release | Joining
ToReader = FetchHeader | Refused | Grown | Released | Ready


class FetchReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a fetch ended; given by the transfer to the engine, exactly once per fetch."""

    request_id: str
    failed: tuple[int, ...] = ()
    """Indices (into the ticket's blocks) that did not arrive intact; empty: all are usable."""
    reason: str = ""
    """A sentence, if any failed."""
    transport: str = ""
    nbytes: int = 0
    """KV bytes that travelled."""
    blocks: int = 0
    """Blocks, slices of blocks or parcels that they were."""
    took_s: float = 0.0
    """Seconds at the source's door: connecting, asking, waiting for answers, taking and checking
    what came; not those in the queue, nor those in which a prompt was still being computed."""
    asking_s: float = 0.0
    """Those of them spent on asking; 0 where blocks can be copied without a word."""

    @property
    def ok(self) -> bool:
        return not self.failed
