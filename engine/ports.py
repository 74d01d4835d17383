"""What the engine needs from others, as narrow interfaces; the workers plug in what fits.

The engine thread calls these and never waits in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.engine.request import Request
from pdserve.protocol.messages import PositionLogprobs
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.transfer import FetchReport


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's part of a step: compute tokens [start, start + length) of `request.token_ids`.

    `start` tokens have their KV in the cache already. `request.block_table` covers at least
    start + length tokens: the KV of token t goes to slot
    block_table[t // block_size] * block_size + t % block_size.
    """

    request: Request
    start: int
    length: int
    samples: bool
    """Draw the token that follows position start + length - 1 (the last known token)."""


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a step brought for one chunk."""

    token_id: int | None = None
    """The drawn token, if the chunk samples."""
    logprobs: PositionLogprobs | None = None
    """Of the drawn token, if `sampling.logprobs` is not None."""
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """If `sampling.prompt_logprobs` is not None: of the prompt tokens that this chunk's positions
    predict, that is tokens start + 1 .. min(start + length, prompt length - 1)."""
    corrupted: bool = False
    """Among the logits that the token was drawn from are some that are not numbers; found only by
    a runner that looks."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know how far a step is. The model's layers are cut into `slices` equal groups;
    `tell(n, computed)` is called when the first n of them have been computed, for each n below
    `slices`; on a device they may be on their way, and `computed()` waits for them, in any
    thread. A step of single tokens may tell nothing."""

    slices: int
    tell: Callable[[int, Callable[[], None] | None], None]


class Runner(Protocol):
    """Turns a plan into tokens. Raises nothing for bad luck in sampling, anything for a fault."""

    def execute(self, chunks: Sequence[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        """Run one step; the result has one entry per chunk, in order. When it returns, the KV of
        chunks whose request is to be handed over is in memory, not merely on its way there. When
        it tells the watcher, that of all earlier steps is."""


class Exporter(Protocol):
    """The outbox as the engine sees it (prefill side)."""

    @property
    def slices(self) -> int:
        """Slices of a block: equal groups of layers, offered one by one while they are computed."""

    def offer(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        block_hashes: Sequence[bytes],
    ) -> KVTicket:
        """Take blocks over and mint a ticket. They stay untouched until the outbox reports them
        returned (through the callback it was built with) exactly once."""

    def withdraw(self, request_id: str) -> None:
        """End the offer now, if there is one: the request was aborted. Still reported returned,
        once nobody reads the blocks any more."""

    def open(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        *,
        sliced: bool = False,
    ) -> KVTicket:
        """Mint a growing ticket: the blocks follow, and stay the request's until `seal` or `cut`.
        `sliced`: slices of them will be offered by themselves (`advance`).
        Exactly one of the two ends every opened ticket."""

    def extend(self, request_id: str, block_ids: Sequence[int]) -> None:
        """The growing ticket's next full blocks: from now on others may read them."""

    def advance(
        self,
        ticket_id: str,
        block_ids: Sequence[int],
        slices: int,
        computed: Callable[[], None] | None = None,
    ) -> None:
        """Of the growing ticket's next blocks the first `slices` slices will not be written to
        again: others may read them, once `computed` has returned."""

    def seal(self, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        """The growing ticket's last blocks; all of them are taken over, as by `offer`. Returns the
        ticket, of the same id."""

    def cut(self, request_id: str) -> bool:
        """End a growing ticket. True: nobody reads the blocks, nothing is reported. False: they are
        taken over, and reported returned once nobody reads them."""


class Importer(Protocol):
    """The inbox as the engine sees it (decode side)."""

    def fetch(
        self,
        ticket: KVTicket,
        wanted: Sequence[int],
        targets: Sequence[int],
        deadline: float,
        done: Callable[[FetchReport], None],
    ) -> None:
        """Fetch the ticket's blocks `wanted` (indices) into the own pool's blocks `targets` (same
        length; may be empty: then the ticket is only released). `done` is called exactly once,
        from any thread, at the latest soon after `deadline` (time.monotonic seconds); until then
        the targets belong to the transfer and must not be freed."""

    def keep(self, ticket: KVTicket) -> None:
        """Renew the ticket's lease until `fetch` or `drop`: its request waits for room here."""

    def drop(self, request_id: str) -> None:
        """Stop renewing: the request ended while it waited."""

    def cancel(self, request_id: str) -> None:
        """Make the fetch of this request end soon (its `done` is still called)."""
