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
from pdserve.engine.overlap import offers_early
from pdserve.engine.ports import Exporter
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
    """The engine's half of the outbox. Without an exporter nothing is ever offered."""

    def __init__(self, pool: BlockPool, exporter: Exporter | None) -> None:
        self._pool = pool
        self._exporter = exporter
        self._held: dict[str, Held] = {}

    @property
    def blocks(self) -> list[list[int]]:
        """The block lists of all tickets in the outbox."""
        return [held.blocks for held in self._held.values()]

    @property
    def num_blocks(self) -> int:
        return sum(len(held.blocks) for held in self._held.values())

    def grow(self, request: Request) -> KVTicket | None:
        """A chunk of a prompt that is not complete has been computed: its full blocks may travel.
        Returns the ticket when it has just been minted. One that was preempted is not offered
        early again: whoever fetched from it has been disappointed once."""
        size = self._pool.block_size
        minted: KVTicket | None = None
        assert self._exporter is not None
        if request.offered is None:
            last = request.sampling.max_tokens == request.num_output + 1
            early = offers_early(request.num_computed, request.num_tokens, size)
            if last or request.preemptions or not early:
                return None
            minted = self._exporter.open(
                request.request_id, request.num_tokens, self._names(request)
            )
            request.offered, request.num_offered = minted, 0
            request.mark(OFFERED)
        full = request.num_computed // size
        self._exporter.extend(request.request_id, request.block_table[request.num_offered : full])
        request.num_offered = full
        return minted

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
