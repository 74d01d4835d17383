"""The pages of the API reference without a network: what they load is served from here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import FileResponse, Response

from pdserve.router.errors import NotFound

ASSETS = "/docs/assets"
FILES = ("favicon.png", "redoc.standalone.js", "swagger-ui-bundle.js", "swagger-ui.css")
FOLDER = Path(str(files("fastapi_offline") / "static"))


def add_offline_docs(app: FastAPI) -> None:
    """/docs and /redoc of an application that was made without them."""

    # A mount would not find its files behind a proxy that strips --root-path.
    @app.get(f"{ASSETS}/{{name}}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in FILES:
            raise NotFound(f"The pages of the API reference load no {name:.100}.")
        return FileResponse(FOLDER / name)

    def place(request: Request, path: str) -> str:
        return f"{str(request.scope.get('root_path', '')).rstrip('/')}{path}"

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url=place(request, "/openapi.json"),
            title=f"{app.title}: the API",
            swagger_js_url=place(request, f"{ASSETS}/swagger-ui-bundle.js"),
            swagger_css_url=place(request, f"{ASSETS}/swagger-ui.css"),
            swagger_favicon_url=place(request, f"{ASSETS}/favicon.png"),
        )

    @app.get("/redoc", include_in_schema=False)
    async def redoc(request: Request) -> Response:
        return get_redoc_html(
            openapi_url=place(request, "/openapi.json"),
            title=f"{app.title}: the API",
            redoc_js_url=place(request, f"{ASSETS}/redoc.standalone.js"),
            redoc_favicon_url=place(request, f"{ASSETS}/favicon.png"),
            with_google_fonts=False,
        )
