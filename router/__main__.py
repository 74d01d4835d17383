"""`python -P -m pdserve.router [--render-only]`: one router, or a server without workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

import uvicorn

from pdserve.cluster.options import fail
from pdserve.cluster.settings import render_settings, router_settings
from pdserve.cluster.tls import server_context
from pdserve.protocol.errors import PdserveError
from pdserve.router.app import create_app, create_render_app
from pdserve.router.serving import configuration, listen

log = logging.getLogger("pdserve.router")

RENDER_ONLY = "--render-only"


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
    listener, where = listen(settings, program)
    log.info("Serving on %s", where)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again when it has shut down; that is the end, not an accident.
        signal.signal(number, lambda *_: None)
    uvicorn.Server(configuration(app, settings, context)).run(sockets=[listener])
    if settings.uds:
        with contextlib.suppress(OSError):
            os.unlink(settings.uds)


if __name__ == "__main__":
    main(sys.argv[1:])
