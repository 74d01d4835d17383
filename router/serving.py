"""How a router listens: its sockets, its limits on the heads of requests, uvicorn's settings."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
import stat
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.cluster.options import fail
from pdserve.cluster.router_settings import RouterSettings
from pdserve.cluster.tls import Refresh
from pdserve.router.http import http_error

KEEP_ALIVE_S = 30
REFRESH_S = 2
"""Between looks at the certificate's files."""
BACKLOG = 2048
LINGER_S = 1.0


class BoundedProtocol(HttpToolsProtocol):
    """HTTP of one connection; the parser itself would take heads of any size."""

    def __init__(self, *args: Any, longest: int, most: int, **named: Any) -> None:
        """`longest`: bytes of a head, to within a read of the socket; `most`: its headers."""
        super().__init__(*args, **named)
        self._longest, self._most = longest, most
        self._in_head = self._refused = False
        self._bytes = 0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._too_many:
            raise ValueError("too many headers")  # the parser gives up: `send_400_response`
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._in_head and not self._refused:
            self._bytes += len(data)
            if self._bytes > self._longest or self._too_many:
                self._refuse()

    @property
    def _too_many(self) -> bool:
        return len(self.headers or ()) > self._most

    def send_400_response(self, msg: str) -> None:
        if self._too_many:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        """Answer, and take what still comes for a moment: who closes with unread bytes before him
        makes the client lose the answer."""
        self._refused = True
        error = http_error(
            431,
            f"The request's head is longer than {self._longest} bytes "
            "(--h11-max-incomplete-event-size), or has more than "
            f"{self._most} headers (--h11-max-header-count).",
        )
        body = error.json()
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.close)


def protocol(settings: RouterSettings) -> Any:
    """uvicorn's `http`."""
    return functools.partial(
        BoundedProtocol,
        longest=settings.h11_max_incomplete_event_size,
        most=settings.h11_max_header_count,
    )


def configuration(
    app: ASGIApp, settings: RouterSettings, context: ssl.SSLContext | None
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol(settings),
        ws="none",
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.shutdown_timeout,  # type: ignore[arg-type]
        server_header=False,
        proxy_headers=False,
        **({} if context is None else _encryption(context, settings)),
    )


def _encryption(context: ssl.SSLContext, settings: RouterSettings) -> dict[str, Any]:
    """uvicorn's arguments for TLS."""
    found: dict[str, Any] = {"ssl_context_factory": lambda *_: context}
    if settings.enable_ssl_refresh:
        watch = Refresh(context, settings)
        found |= {"callback_notify": watch.look, "timeout_notify": REFRESH_S}
    return found


def listen(settings: RouterSettings, program: str) -> tuple[socket.socket, str]:
    """The listening socket, taken before anything else is started, and where it is. Prints a
    sentence and exits with code 2 if it cannot be had."""
    if settings.uds:
        return _listen_at_path(settings.uds, program), f"unix:{settings.uds}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.share_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        fail(program, _why_not(where, error, "Give another --port, or stop what uses it."))
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return listener, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _listen_at_path(path: str, program: str) -> socket.socket:
    """Takes the place of a socket at which nobody listens any more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        fail(program, _why_not(path, error, "Give another --uds, or stop what uses it."))
    return listener


def _is_left_over(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) != 0


def _why_not(where: str, error: OSError, remedy: str) -> str:
    return f"Cannot listen on {where}: {(error.strerror or str(error)).lower()}. {remedy}"
