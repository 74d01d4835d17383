"""Messages between routers and workers.

One connection per router and worker carries everything. Downwards: `Submit`, `Continue` and
`Abort`. Upwards: one `StepFrame` per engine step with that step's tokens of all the router's
requests, so that the cost of a step does not grow with the number of client streams.
"""

from __future__ import annotations

import enum

import msgspec

from pdserve.protocol.blocks import unpack_tokens
from pdserve.protocol.errors import WorkerError
from pdserve.protocol.measures import Measures
from pdserve.protocol.orders import Drain, OrderDone, SwitchRole
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket


class FinishReason(enum.StrEnum):
    """Why a request ended; the same word reaches the client's JSON."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class LifeEvent(msgspec.Struct, frozen=True, array_like=True):
    """A moment in a request's life on one worker."""

    name: str
    """One of `pdserve.protocol.events`."""
    at_s: float
    """Seconds since this worker received the request (monotonic clock of that worker)."""


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, natural logarithm."""

    logprob: float
    """Of the token that stands there."""
    rank: int
    """1 + number of tokens more likely than it."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, most likely first."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="submit"):
    """A request for a worker.

    - `hand_off`: draw the first token, keep the KV blocks and answer with a ticket (prefill leg).
    - `ticket`: fetch the prompt's KV blocks with it instead of computing them (decode leg). While
      the ticket is still growing there is no token yet: it comes in a `Continue`.
    - neither: do everything here (colocated, or a prompt not worth a transfer).
    """

    request_id: str
    """Unique per attempt, made by the router; never parsed for meaning."""
    epoch: int
    """The worker's incarnation that the router means; another one refuses."""
    prompt: bytes
    """At least one token id, packed (`protocol.blocks.pack_tokens`): routers need that form for
    route hashes, too, and it is sent with each leg."""
    output_token_ids: list[int] = []
    """Tokens of the answer that exist already (the first token on a decode leg; all tokens so far
    when a stream moves): they count for penalties, limits and positions and are not sent again."""
    sampling: SamplingParams
    hand_off: bool = False
    ticket: KVTicket | None = None
    timeout_s: float
    """Seconds left until the request ends with the error `deadline`."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only among requests with the same salt."""
    priority: int = 0
    """Lower ones start first; equal ones in order of arrival."""

    @property
    def prompt_len(self) -> int:
        """In tokens."""
        return len(self.prompt) // 4

    @property
    def prompt_token_ids(self) -> list[int]:
        """Unpacked anew each time."""
        return unpack_tokens(self.prompt)


class Abort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="abort"):
    """End a request in whatever state it is, the outbox included. Idempotent, never answered."""

    request_id: str
    epoch: int


class Continue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="go"):
    """The first tokens of a request that was submitted with a growing ticket. Never answered; a
    request that has ended meanwhile has said so."""

    request_id: str
    epoch: int
    output_token_ids: list[int]
    """At least one. They are not sent again."""


class Alive(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alive"):
    """The router lives; never answered. One that says nothing at all for a while is cut off, and
    its requests end."""

    epoch: int


ToWorker = Submit | Continue | Abort | Alive | Drain | SwitchRole


class Output(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What one step brought one request."""

    request_id: str
    token_ids: list[int] = []
    """New tokens, in order."""
    logprobs: list[PositionLogprobs] | None = None
    """One for each of `token_ids`, if asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a request on this worker, unless it ends in a `ticket`."""
    stop_token_id: int | None = None
    """The token (of `stop_token_ids`) that ended it; None for eos and length."""
    ticket: KVTicket | None = None
    """Set on the last output of a prefill leg whose request goes on elsewhere; or, with nothing
    else, a growing one while the prompt is still being computed: the last output repeats it."""
    error: WorkerError | None = None
    """Set with finish_reason `error`."""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """Sent once, with the first token, if asked for; the first entry is None."""
    cached_tokens: int | None = None
    """Sent once, with the first output: prompt tokens found in this worker's prefix cache."""
    events: tuple[LifeEvent, ...] = ()
    """Sent with the last output."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's load at the end of a step. Blocks: total = free + cached + requests + outbox."""

    blocks_total: int
    blocks_free: int
    blocks_cached: int
    """In the prefix cache and referenced by nobody: free on demand."""
    blocks_held: int
    """In the outbox, waiting to be fetched."""
    waiting: int
    """Requests not yet started."""
    running: int
    """Requests in prefill or decode."""
    fetching: int
    """Requests whose blocks are on their way here."""
    queued_tokens: int
    """Prompt tokens not yet computed, of waiting and running requests."""
    steps: int
    """Engine steps since the start."""
    step_tokens: int = 0
    """Tokens that they computed, of prompts and of answers."""
    preemptions: int = 0
    tickets: int = 0
    """In the outbox: finished prefills that somebody must still fetch."""
    tickets_early: int = 0
    """Tickets that left while their prompt was still being computed, since the start."""
    draining: bool = False
    bytes_in: int = 0
    """KV bytes fetched from others since the start."""
    bytes_out: int = 0
    """KV bytes others fetched from here since the start."""
    bytes_early: int = 0
    """Those of `bytes_out` that left while their prompt was still being computed."""


class StepFrame(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag="step",
):
    """All that one engine step has for one router. Also sent, without outputs, as a heartbeat."""

    epoch: int
    step: int
    outputs: list[Output]
    status: WorkerStatus | None = None
    measures: Measures | None = None
    """With heartbeats only."""


ToRouter = StepFrame
ToOperator = StepFrame | OrderDone
