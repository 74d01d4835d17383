"""What an operator may order a worker to do, over a channel like a router's.

The channel's handshake proves that both sides know the cluster's secret; whoever knows it may give
orders. While an order is carried out, the worker's heartbeats (`StepFrame`) tell how far it is.
"""

from __future__ import annotations

import enum

import msgspec

from pdserve.protocol.errors import WorkerError


class Role(enum.StrEnum):
    """Which legs of requests routers give a worker. Every worker can do all of them, so that a
    role can change while it runs; legs that it has go on."""

    PREFILL = "prefill"
    """Prompts in, tickets out."""
    DECODE = "decode"
    """Tickets in, tokens out; prefills by itself only when a ticket's blocks are lost."""
    COLOCATED = "colocated"
    """Both: takes prompts, and keeps them or hands them over."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="drain"):
    """Take nothing new, finish what there is and what others must still fetch, then leave."""

    epoch: int
    timeout_s: float
    """After so long the worker leaves whatever it still has; its routers move the requests."""


class SwitchRole(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="role"):
    """Have another role from now on."""

    epoch: int
    role: Role


class OrderDone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="done"):
    """The last word about an order."""

    error: WorkerError | None = None
    """Why it was not carried out."""
    requests: int = 0
    """Left unfinished by a `Drain` whose time was over."""
    tickets: int = 0
    """Not fetched by then."""


Order = Drain | SwitchRole
