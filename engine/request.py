"""A request inside the engine: its tokens, its blocks and where it stands. No tensors."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdserve.protocol.events import QUEUED
from pdserve.protocol.messages import LifeEvent, PositionLogprobs
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket

if TYPE_CHECKING:
    from pdserve.engine.grammar import Matcher


class State(enum.Enum):
    """Where a request stands; ARCHITECTURE.md draws the transitions."""

    WAITING = enum.auto()
    """Owns no blocks."""
    FETCHING = enum.auto()
    """Owns blocks that the transfer is filling; they must not be freed before it reports."""
    ARRIVED = enum.auto()
    """Owns the blocks of its prompt, and waits for the token that the prefill worker has drawn."""
    RUNNING = enum.auto()
    """Owns the blocks of its computed tokens; prefill while more than one token is uncomputed."""
    FINISHED = enum.auto()
    """Owns nothing; its last output is out."""


@dataclass(slots=True, eq=False)
class Request:
    """One request on one worker.

    Invariants: 0 ≤ num_computed < len(token_ids) while running; the KV of token_ids[:num_computed]
    is in the blocks of `block_table`; outputs are token_ids[prompt_len:].
    """

    request_id: str
    token_ids: list[int]
    """Prompt and output so far; the engine appends each drawn token."""
    prompt_len: int
    sampling: SamplingParams
    deadline: float
    """time.monotonic seconds; past it the request ends with the error `deadline`."""
    root: bytes
    """Parent hash of its first block (layout and cache salt)."""
    hand_off: bool = False
    ticket: KVTicket | None = None
    matcher: Matcher | None = None
    """Where its outputs stand in its `sampling.constraint`."""
    awaits_token: bool = False
    """Its ticket was growing when it came: the first token follows in a `Continue`."""
    client: object = None
    """Whoever submitted it; outputs are grouped by it. Opaque to the engine."""
    priority: int = 0
    """Lower ones start first."""

    state: State = State.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    hashes: list[bytes] = field(default_factory=list)
    """Hashes of its full blocks of token_ids, as far as computed; a cache, never shortened."""
    salt: str = ""
    """Cache salt, for its route hashes."""
    routes: list[bytes] = field(default_factory=list)
    """Its route hashes, as far as computed; empty if nobody listens to the pool."""
    offered: KVTicket | None = None
    """Its growing ticket, while it is computed here: its first blocks may be read by others."""
    num_offered: int = 0
    """Blocks, from the first, that were offered with it."""
    num_registered: int = 0
    """Full blocks, from the first, that were offered to the prefix cache."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache when first scheduled."""
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    preemptions: int = 0
    abort_requested: bool = False
    answered: bool = False
    """It has drawn a token on this worker."""
    corrupted: bool = False
    """Logits of its were not numbers."""
    ending: frozenset[int] = frozenset()
    """Tokens that end it; set from `sampling`."""
    received: float = field(default_factory=time.monotonic)
    events: list[LifeEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ending = self.sampling.ending_token_ids
        self.mark(QUEUED)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def mark(self, name: str) -> None:
        """Record a life event now."""
        self.events.append(LifeEvent(name, round(time.monotonic() - self.received, 6)))
