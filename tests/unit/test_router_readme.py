"""The README's table of endpoints and the routes are the same."""

from __future__ import annotations

import re
from pathlib import Path

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.app import create_app

README = Path(__file__).parents[2] / "README.md"
HELPERS = {"/docs/oauth2-redirect", "/redoc", "/openapi.json"}
"""Routes that FastAPI adds beside /docs."""


def served() -> set[tuple[str, str]]:
    """Every (method, path) of a router with everything switched on."""
    app = create_app(RouterSettings(secret="x", enable_tokenizer_info_endpoint=True))
    found = set()
    for route in app.routes:
        path = getattr(route, "path", "")
        methods = (getattr(route, "methods", None) or set()) - {"HEAD"}
        found |= {(method, re.sub(r"\{\w+:?\w*\}", "{id}", path)) for method in methods}
    return {(method, path) for method, path in found if path not in HELPERS}


def listed() -> set[tuple[str, str]]:
    """Every (method, path) in the README's table: `GET /path` in code."""
    found = set()
    for line in README.read_text().splitlines():
        if re.match(r"\| `[A-Z]+ /", line):
            found |= set(re.findall(r"`([A-Z]+) (/[^` ]*)`", line.rsplit("|", 2)[0]))
    return found


def test_the_table_names_every_route_and_no_other() -> None:
    assert listed() == served()
