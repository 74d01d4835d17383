"""Errors of the HTTP side, and the one table from error to HTTP.

    PdserveError
    └── ApiError               an answer other than 2xx: status, type, message, param
        ├── BadRequest         400 BadRequestError: a value breaks a rule
        ├── SchemaError        400 "Bad Request": the body does not fit the request's schema
        ├── NotFound           404
        ├── Overloaded         429 with Retry-After
        └── Unavailable        503 with Retry-After

Errors that workers report (`RequestError`, `WorkerError`) become an ApiError through `from_code`.
The same object can be a whole answer or, once a stream has begun, its last frame.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pdserve.protocol.errors import ErrorCode, PdserveError, RequestError

RETRY_AFTER_S = 1
"""Seconds that a client is asked to wait when nothing better is known."""

ANTHROPIC_OVERLOADED = 529
"""Anthropic's status for what is 503 elsewhere."""
BAD_KIND = "invalid_request_error"
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

MAX_LISTED = 10
"""Problems of a body that are told at once."""
MAX_INPUT_CHARS = 200


class ApiError(PdserveError):
    """An answer that is not a 2xx. `headers` are added to it (Retry-After)."""

    status = 500
    kind = "InternalServerError"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status or self.status
        self.kind = kind or self.kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object: message, type, param, code are always present."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }

    def anthropic(self) -> tuple[int, dict[str, Any]]:
        """The status and the error object of Anthropic's API, whose messages name the field."""
        status = ANTHROPIC_OVERLOADED if self.status == 503 else self.status
        named = not self.param or self.param in self.message
        message = self.message if named else f"{self.param}: {self.message}"
        kind = ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else BAD_KIND)
        return status, {"type": "error", "error": {"type": kind, "message": message}}

    def json(self) -> bytes:
        return msgspec.json.encode(self.body())


class BadRequest(ApiError):
    status = 400
    kind = "BadRequestError"


class SchemaError(ApiError):
    status = 400
    kind = "Bad Request"


class NotFound(ApiError):
    status = 404
    kind = "NotFoundError"


class Overloaded(ApiError):
    status = 429
    kind = "RateLimitError"

    def __init__(self, message: str, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class Unavailable(ApiError):
    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self, message: str, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


_RETRY = {"Retry-After": str(RETRY_AFTER_S)}

TABLE: dict[ErrorCode, tuple[int, str, dict[str, str]]] = {
    ErrorCode.INVALID_REQUEST: (400, "BadRequestError", {}),
    ErrorCode.OVERLOADED: (429, "RateLimitError", _RETRY),
    ErrorCode.DEADLINE: (504, "TimeoutError", {"x-should-retry": "false"}),
    ErrorCode.STALE_EPOCH: (503, "ServiceUnavailableError", _RETRY),
    ErrorCode.KV_LOST: (503, "ServiceUnavailableError", _RETRY),
    ErrorCode.DRAINING: (503, "ServiceUnavailableError", _RETRY),
    ErrorCode.WORKER_LOST: (503, "ServiceUnavailableError", _RETRY),
    ErrorCode.NO_WORKER: (503, "ServiceUnavailableError", _RETRY),
    ErrorCode.INTERNAL: (500, "InternalServerError", {}),
}
"""Each code of a worker or of the dispatcher: HTTP status, error type, headers."""


def from_code(code: ErrorCode, message: str) -> ApiError:
    """The HTTP face of a worker's error."""
    status, kind, headers = TABLE[code]
    return ApiError(message, status=status, kind=kind, headers=headers)


def from_exception(error: BaseException) -> ApiError:
    """The HTTP face of any exception. What nobody foresaw is a 500 that says nothing of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return from_code(error.code, error.message)
    return ApiError("The router failed on this request; its log says why.")


def short(value: object) -> str:
    """Any value in a few characters: a deep or a long one must not cost more than a small one."""
    writer = reprlib.Repr()
    writer.maxlevel = 3
    writer.maxstring = writer.maxother = writer.maxlong = MAX_INPUT_CHARS
    return writer.repr(value)[:MAX_INPUT_CHARS]


def schema_error(problems: Iterable[Mapping[str, Any]], root: str = "body") -> SchemaError:
    """pydantic's list of problems as one answer; `param` is the dotted place of the first."""
    listed = list(problems)
    lines = [f"{len(listed)} validation error{'s' if len(listed) > 1 else ''}:"]
    for problem in listed[:MAX_LISTED]:
        place = (root, *problem.get("loc", ()))
        shown = short(problem.get("input"))
        lines.append(
            f"  {{'type': {problem.get('type')!r}, 'loc': {place!r}, "
            f"'msg': {problem.get('msg')!r}, 'input': {shown}}}"
        )
    first = listed[0].get("loc", ()) if listed else ()
    steps = [*first[:1], *(step for step in first[1:] if isinstance(step, int))]  # no type names
    return SchemaError("\n".join(lines), param=".".join(str(step) for step in (root, *steps)))
