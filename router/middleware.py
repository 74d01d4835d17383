"""Middleware of whoever runs the router: `--middleware`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fastapi import FastAPI

from pdserve.protocol.errors import PdserveError


class MiddlewareError(PdserveError):
    """A --middleware that cannot be used."""


def add_middleware(app: FastAPI, path: str) -> None:
    """Put what is imported from `path` around what the app has. Raises MiddlewareError."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MiddlewareError(f"--middleware {path} cannot be imported: {error}.") from None
    if inspect.isclass(found):
        app.add_middleware(found)  # type: ignore[arg-type]
    elif inspect.iscoroutinefunction(found):
        app.middleware("http")(found)
    else:
        raise MiddlewareError(
            f"--middleware {path} must be an ASGI class or an async function (request, call_next)."
        )
