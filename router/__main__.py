"""`python -P -m pdserve.router [--render-only]`: one router, or a server without workers."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from pdserve.cluster.options import fail
from pdserve.cluster.router_settings import RouterSettings
from pdserve.cluster.settings import render_settings, router_settings
from pdserve.cluster.tls import Refresh, server_context
from pdserve.protocol.errors import PdserveError
from pdserve.router.app import create_app, create_render_app

log = logging.getLogger("pdserve.router")

RENDER_ONLY = "--render-only"
KEEP_ALIVE_S = 30
REFRESH_S = 2
"""Between looks at the certificate's files."""
SHUTDOWN_S = 2
"""Seconds that streams get to end after SIGTERM."""


def main(argv: Sequence[str]) -> None:
    """Serve until SIGINT or SIGTERM. A bad setting, model or port is a sentence and exit code 2."""
    render = RENDER_ONLY in argv
    program = "pdserve render" if render else "pdserve router"
    options = [text for text in argv if text != RENDER_ONLY]
    settings = render_settings(options) if render else router_settings(options)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        context = server_context(settings)
        app = create_render_app(settings) if render else create_app(settings)
    except PdserveError as error:
        fail(program, str(error))
    listener = _listen(settings, program)
    host, port = listener.getsockname()[:2]
    scheme = "https" if context else "http"
    log.info("Serving on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
        proxy_headers=False,
        **({} if context is None else _encryption(context, settings)),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again when it has shut down; that is the end, not an accident.
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def _encryption(context: ssl.SSLContext, settings: RouterSettings) -> dict[str, Any]:
    """uvicorn's arguments for TLS."""
    found: dict[str, Any] = {"ssl_context_factory": lambda *_: context}
    if settings.enable_ssl_refresh:
        watch = Refresh(context, settings)
        found |= {"callback_notify": watch.look, "timeout_notify": REFRESH_S}
    return found


def _listen(settings: RouterSettings, program: str) -> socket.socket:
    """The listening socket, taken before anything else is started."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if settings.share_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        fail(
            program,
            f"Cannot listen on {settings.host} port {settings.port}: {reason}. Give another "
            "--port, or stop what uses it.",
        )
    return listener


if __name__ == "__main__":
    main(sys.argv[1:])
