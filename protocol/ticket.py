"""The KV ticket: the right to fetch the blocks of one prefill, once, for a while."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from pdserve.protocol import PROTOCOL_VERSION

NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Of an element, by dtype."""
CONVERTIBLE = ("float32", "bfloat16", "float16")
"""Element types that can be converted into each other, and packed on the way."""
RESHAPED = ("dtype", "block_size", "tp_rank", "tp_size")
"""Fields of a fingerprint in which two pools may differ if blocks travel as parcels."""


class LayoutFingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that two pools must share before a block of one means anything in the other.

    Compared before any block is looked at; `difference` names the field that differs.
    """

    model: str
    """Digest of the model's configuration (not its path: hosts may differ)."""
    weights: str
    """Digest that changes with the weights (file names, sizes and headers)."""
    dtype: str
    """KV element type: "float32", "bfloat16", "float16" or "float8_e4m3fn"."""
    num_layers: int
    num_kv_heads: int
    """KV heads of the whole model; a worker holds num_kv_heads / tp_size of them."""
    head_dim: int
    block_size: int
    """Tokens per block."""
    batch_invariant: bool = False
    """Whether K and V have the bits that --batch-invariant promises."""
    tp_rank: int = 0
    tp_size: int = 1
    protocol_version: int = PROTOCOL_VERSION

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token's K and V, all layers, in the pool of one rank."""
        heads = max(1, self.num_kv_heads // self.tp_size)
        return 2 * self.num_layers * heads * self.head_dim * NBYTES[self.dtype]

    def difference(self, other: LayoutFingerprint, apart_from: Collection[str] = ()) -> str | None:
        """None if equal (in all fields but those in `apart_from`), else a sentence that names the
        first differing field and both values."""
        if self == other:
            return None
        for name in self.__struct_fields__:
            if name in apart_from:
                continue
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"The KV layouts differ in {name}: {mine!r} here, {theirs!r} there."
        return None

    def digest(self) -> str:
        """A short text that is equal exactly when the fingerprints are."""
        return msgspec.json.encode(self).decode()

    def family(self, *, converts: bool) -> str:
        """A short text that is equal exactly for pools between which blocks can move, be it as
        parcels. `converts`: also out of another element type."""
        layout = msgspec.structs.replace(self, block_size=0, tp_rank=0, tp_size=1)
        if converts and self.dtype in CONVERTIBLE and not self.batch_invariant:
            layout = msgspec.structs.replace(layout, dtype="")
        return layout.digest()


class LeaseMark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a reader on the source's host sees whether a ticket stands, and what the source has
    summed of it (`kv_transfer/ledger.py`)."""

    path: str
    """Under which the source's ledger can be opened."""
    nonce: bytes
    """Found at its end."""
    slot: int
    stamp: int
    """What the slot holds as long as the ticket stands."""


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a ticket's blocks lie in memory that others on the host may map."""

    transport: str
    """Over which they can be copied from there."""
    host_id: str
    path: str
    """"shm": under which the source's pool can be opened."""
    nonce: bytes
    """"shm": found at its end. "ipc": names a pool that a header has told of before."""
    block_nbytes: int
    blocks: bytes
    """The numbers of the ticket's blocks in that pool, in order: uint32, little-endian."""
    mark: LeaseMark


class KVTicket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names the KV blocks that a prefill worker holds for one request, and where to fetch them.

    Opaque to the router. The source keeps the blocks under a lease; whoever fetches renews it and
    releases it once. An epoch other than the source's current one is refused.
    """

    ticket_id: str
    request_id: str
    source: str
    """Worker id of the prefill worker."""
    epoch: int
    """The source's incarnation number."""
    host: str
    port: int
    """Where the source's transfer server listens."""
    transports: tuple[str, ...]
    """What the source offers, best first, e.g. ("shm", "tcp")."""
    fingerprint: LayoutFingerprint
    num_tokens: int
    """Prompt tokens whose KV the blocks hold (the first generated token's is not among them)."""
    num_blocks: int
    """ceil(num_tokens / block_size)."""
    block_hashes: tuple[bytes, ...]
    """Hashes of the full blocks (num_tokens // block_size of them)."""
    lease_s: float
    """Seconds, from the moment all blocks are there, after which the source may take them back."""
    growing: bool = False
    """Minted while the prompt was still being computed: the blocks become ready one after the
    other, the first token follows them, and the source may end the ticket at any time."""
    slices: int = 1
    """Of a growing ticket: equal parts of a block, some neighbouring layers each, that become
    ready one after the other and may be fetched by themselves."""
    place: Place | None = None
    """For a reader on the same host: enough to copy the blocks without a word to the source."""
