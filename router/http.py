"""The HTTP layer under the routes: reading bodies, keys, request ids, errors."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette._utils import get_route_path
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.router.errors import ApiError, SchemaError, from_exception
from pdserve.router.http_metrics import HttpRequest
from pdserve.router.schemas import decode

log = logging.getLogger(__name__)

GUARDED = ("/v1", "/v2", "/inference", "/cohere")
"""Paths below these need the key."""
ANTHROPIC = ("/v1/messages", "/v1/models")
"""Below these the key may come in x-api-key, too, as Anthropic's clients send it."""
GONE = 499
"""Counted for clients that left before their answer began."""
BODY_TIMEOUT_S = 60.0
"""How long a client may take to send its body."""
REQUEST_ID = re.compile(r"[!-~]{1,256}")
"""What a client's X-Request-Id must look like to be used."""


class JsonResponse(Response):
    """Bytes that are JSON already."""

    media_type = "application/json"


def error_response(error: ApiError, scope: Scope) -> Response:
    """An error in the shape of the API that was called."""
    if speaks_anthropic(scope):
        status, body = error.anthropic()
        return JsonResponse(msgspec.json.encode(body), status_code=status, headers=error.headers)
    return JsonResponse(error.json(), status_code=error.status, headers=error.headers)


def speaks_anthropic(scope: Scope) -> bool:
    return below(scope, "/v1/messages")


def below(scope: Scope, *paths: str) -> bool:
    """The request is for one of the paths or for something below it."""
    path = get_route_path(scope)
    return any(path == one or path.startswith(one + "/") for one in paths)


def http_error(status: int, message: str = "") -> ApiError:
    """An error of the HTTP layer itself: 404 and 405 of routing, 408, 413."""
    phrase = http.HTTPStatus(status).phrase
    kind = {404: "NotFoundError"}.get(status, phrase)
    return ApiError(message or phrase, status=status, kind=kind)


async def read_json(request: Request, limit: int) -> Any:
    """The decoded JSON body. Raises SchemaError, or ApiError 413, 415 or 408."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise SchemaError(
            "1 validation error: Unsupported Media Type: Only 'application/json' is allowed"
        )
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise http_error(415, f"Bodies must not be compressed; the content-encoding is {coding!r}.")
    return decode(await read_body(request, limit))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_long(limit)
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more:
                message = await request.receive()
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_long(limit)
    except TimeoutError:
        raise http_error(408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    return http_error(413, f"The body is longer than the limit of {limit} bytes (--max-body).")


class Gate:
    """Outermost layer: request ids, keys, counts, and a JSON answer to whatever went wrong."""

    def __init__(
        self,
        app: ASGIApp,
        keys: tuple[str, ...],
        count: Callable[[HttpRequest], None],
    ) -> None:
        """`keys`: any of them opens the guarded paths; none: they are open. `count` is told of
        every request."""
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = _header(scope, b"x-request-id")
        known = given if REQUEST_ID.fullmatch(given) else ""
        scope["pdserve.request_id"] = known
        scope["pdserve.shown_id"] = known or secrets.token_hex(16)
        shown = scope["pdserve.shown_id"].encode()
        names = (b"x-request-id", b"request-id") if speaks_anthropic(scope) else (b"x-request-id",)
        status = sent = 0

        async def send_on(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name, shown) for name in names),
                ]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._serve(scope, receive, send_on)
        except Exception as error:
            if status:
                raise  # too late to say anything: the server closes the connection
            if not isinstance(error, ApiError):
                log.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(from_exception(error), scope)(scope, receive, send_on)
        finally:
            route = scope.get("route")
            announced = _header(scope, b"content-length")
            served = HttpRequest(
                handler=getattr(route, "path", None) or "none",
                method=scope["method"],
                status=status or GONE,
                seconds=time.monotonic() - started,
                received=int(announced) if announced.isdigit() else 0,
                sent=sent,
            )
            self._count(served)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests and scope["method"] != "OPTIONS" and not self._may_pass(scope):
            refusal: Response = JsonResponse(b'{"error":"Unauthorized"}', status_code=401)
            if speaks_anthropic(scope):
                refusal = error_response(
                    ApiError("The API key is missing or wrong.", status=401), scope
                )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if not get_route_path(scope).startswith(GUARDED):
            return True
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        opens = scheme.lower() == "bearer" and self._is_key(token.strip())
        if not opens and below(scope, *ANTHROPIC):
            opens = self._is_key(_header(scope, b"x-api-key").strip())
        return opens

    def _is_key(self, token: str) -> bool:
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        return any(matches)


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""
