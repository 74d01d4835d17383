"""What leaves a prefill worker: the blocks in the outbox, and tickets of prompts still computed.

    request's blocks ──grow──► offered, still the request's ──hand_over──► HELD ──returned──► pool
           │                        └── let_go, somebody reads them ────────► HELD
           └── hand_over ──► HELD   └── let_go, nobody reads them ──► pool at once

Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.engine.blocks import BlockPool, IntegrityError
from pdserve.engine.overlap import BY_LAYERS_BYTES, offers_early
from pdserve.engine.ports import Chunk, Exporter
from pdserve.engine.request import Request
from pdserve.protocol.blocks import block_hashes
from pdserve.protocol.events import HELD, OFFERED
from pdserve.protocol.ticket import KVTicket


@dataclass(frozen=True, slots=True)
class Held:
    """Blocks in the outbox, as the engine accounts for them."""

    request_id: str
    client: object
    blocks: list[int]


class Outgoing:
    """The engine's half of the outbox. Without an exporter nothing is ever offered.
    `token_nbytes`: KV bytes of a token, all layers."""

    def __init__(self, pool: BlockPool, exporter: Exporter | None, token_nbytes: int) -> None:
        self._pool = pool
        self._exporter = exporter
        self._token_nbytes = token_nbytes
        self._held: dict[str, Held] = {}
        self.num_early = 0
        """Tickets minted before their prompt was complete, since the start."""

    @property
    def blocks(self) -> list[list[int]]:
        """The block lists of all tickets in the outbox."""
        return [held.blocks for held in self._held.values()]

    @property
    def num_blocks(self) -> int:
        return sum(len(held.blocks) for held in self._held.values())

    def grow(self, chunk: Chunk) -> KVTicket | None:
        """A chunk of a prompt that is not complete has been computed: its full blocks may travel.
        Returns the ticket when it has just been minted."""
        request = chunk.request
        minted: KVTicket | None = None
        if request.offered is None:
            minted = self._open(request, request.num_computed, self._is_large(chunk))
        if request.offered is not None:
            self._extend(request, request.num_computed)
        return minted

    def goes_by_layers(self, chunk: Chunk) -> bool:
        """Whether the chunk's KV may leave while later layers are still being computed."""
        request = chunk.request
        may = _may_be_early(request) if request.offered is None else request.offered.slices > 1
        return request.hand_off and self._is_large(chunk) and may

    def _is_large(self, chunk: Chunk) -> bool:
        return self.slices > 1 and chunk.length * self._token_nbytes >= BY_LAYERS_BYTES

    @property
    def slices(self) -> int:
        return 1 if self._exporter is None else self._exporter.slices

    def advance(
        self, chunk: Chunk, slices: int, computed: Callable[[], None] | None
    ) -> KVTicket | None:
        """Of a chunk that goes by layers the first slices have been computed, or will have been
        when `computed` returns. Returns the ticket when it has just been minted."""
        request, size = chunk.request, self._pool.block_size
        minted: KVTicket | None = None
        if request.offered is None:
            so_far = chunk.start + chunk.length * slices // self.slices
            minted = self._open(request, so_far, sliced=True)
            if minted is None:
                return None
            self._extend(request, chunk.start)
        end = chunk.start + chunk.length
        full = -(-end // size) if end == request.num_tokens else end // size
        blocks = request.block_table[request.num_offered : full]
        assert self._exporter is not None and request.offered is not None
        if blocks:
            self._exporter.advance(request.offered.ticket_id, blocks, slices, computed)
        return minted

    def _open(self, request: Request, computed: int, sliced: bool) -> KVTicket | None:
        """Mint a growing ticket if it is time for it: about `computed` tokens are there."""
        early = offers_early(computed, request.num_tokens, self._pool.block_size)
        if not early or not _may_be_early(request):
            return None
        assert self._exporter is not None
        minted = self._exporter.open(
            request.request_id, request.num_tokens, self._names(request), sliced=sliced
        )
        request.offered, request.num_offered = minted, 0
        self.num_early += 1
        request.mark(OFFERED)
        return minted

    def _extend(self, request: Request, num_tokens: int) -> None:
        """Offer the full blocks of the first `num_tokens` tokens."""
        assert self._exporter is not None
        full = num_tokens // self._pool.block_size
        self._exporter.extend(request.request_id, request.block_table[request.num_offered : full])
        request.num_offered = full

    def _names(self, request: Request) -> list[bytes]:
        request.hashes = block_hashes(
            request.token_ids, self._pool.block_size, request.root, request.hashes
        )
        return request.hashes[: request.num_tokens // self._pool.block_size]

    def hand_over(self, request: Request, num_tokens: int) -> KVTicket:
        """The KV of `num_tokens` tokens is in the request's blocks, which now belong to the outbox;
        returns their ticket. The request has left the scheduler."""
        assert self._exporter is not None
        blocks = request.block_table
        self._pool.hold(blocks)
        if request.offered is not None:
            self._hold(request.offered.ticket_id, request)
            ticket = self._exporter.seal(request.request_id, blocks[request.num_offered :])
        else:
            names = request.hashes[: num_tokens // self._pool.block_size]
            ticket = self._exporter.offer(request.request_id, blocks, num_tokens, names)
            self._hold(ticket.ticket_id, request)
        request.offered, request.block_table = None, []
        request.mark(HELD)
        return ticket

    def let_go(self, request: Request) -> None:
        """Free a request's blocks, those that somebody reads when he has stopped."""
        if request.offered is not None:
            assert self._exporter is not None
            offered, request.offered = request.offered, None
            if not self._exporter.cut(request.request_id):
                self._pool.hold(request.block_table)
                self._hold(offered.ticket_id, request)
                return
        self._pool.release(request.block_table)

    def _hold(self, ticket_id: str, request: Request) -> None:
        self._held[ticket_id] = Held(request.request_id, request.client, request.block_table)

    def withdraw(self, which: Callable[[Held], bool]) -> None:
        """End the tickets that are in the outbox, where `which` says so."""
        for held in [h for h in self._held.values() if which(h)]:
            assert self._exporter is not None
            self._exporter.withdraw(held.request_id)

    def returned(self, ticket_id: str) -> None:
        """The outbox has given a ticket's blocks back. Raises IntegrityError if it has not got
        them."""
        held = self._held.pop(ticket_id, None)
        if held is None:
            raise IntegrityError(f"The blocks of ticket {ticket_id} were returned twice.")
        self._pool.release(held.blocks)


def _may_be_early(request: Request) -> bool:
    """Not if the token to come is the last one, and not after a preemption: whoever fetched then
    has been disappointed once."""
    return request.sampling.max_tokens > request.num_output + 1 and not request.preemptions
