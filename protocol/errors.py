"""Error codes that processes exchange, and the exceptions that carry them.

PdserveError
├── ProtocolError        a frame that cannot be read, too large, or from a stranger
│   └── AuthenticationError   the peer does not know the cluster's secret
└── RequestError         a request that ended without an answer, with its code
"""

from __future__ import annotations

import enum

import msgspec


class ErrorCode(enum.StrEnum):
    """Why a worker ended a request; the router maps each to one HTTP status."""

    INVALID_REQUEST = "invalid_request"
    """The request can never be served here (its fault, never counted against a worker)."""
    OVERLOADED = "overloaded"
    """Queues are full; try again later."""
    DEADLINE = "deadline"
    """The request's time ran out."""
    STALE_EPOCH = "stale_epoch"
    """The message was meant for an earlier incarnation of this worker."""
    KV_LOST = "kv_lost"
    """The ticket's blocks are gone and the worker may not prefill by itself."""
    DRAINING = "draining"
    """The worker is leaving and takes no new requests."""
    WORKER_LOST = "worker_lost"
    """The worker, or the connection to it, died while it held the request."""
    NO_WORKER = "no_worker"
    """No worker of the kind needed is alive."""
    INTERNAL = "internal"
    """A fault of ours."""


class WorkerError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request failed on a worker: a code for programs and a sentence for people."""

    code: ErrorCode
    message: str


class PdserveError(Exception):
    """Base of every exception that the project raises on purpose; `str()` is a sentence."""


class ProtocolError(PdserveError):
    """Bytes from a peer that break the protocol: the connection must be closed."""


class AuthenticationError(ProtocolError):
    """The peer did not prove that it knows the cluster's secret."""


class RequestError(PdserveError):
    """A request that ended without an answer."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
