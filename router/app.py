"""The ASGI applications: a router, and a server that only renders; routes are put together here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from pdserve.cluster.router_settings import RouterSettings
from pdserve.router import openapi
from pdserve.router.docs import add_offline_docs
from pdserve.router.errors import ApiError, schema_error
from pdserve.router.front import Front
from pdserve.router.http import Gate, error_response, http_error
from pdserve.router.messages_api import add_message_counting, add_messages_routes
from pdserve.router.middleware import add_middleware
from pdserve.router.openai_api import add_openai_routes
from pdserve.router.render_api import add_render_routes
from pdserve.router.responses_api import add_item_counting, add_responses_routes
from pdserve.router.responses_desk import ResponsesDesk
from pdserve.router.router import Router
from pdserve.router.scale_out import add_scale_out_routes
from pdserve.router.served import load_model, version
from pdserve.router.status_api import Condition, add_status_routes
from pdserve.router.text_api import add_text_routes


def create_app(settings: RouterSettings) -> FastAPI:
    """The router as an ASGI application. Reads the model's files at once: raises ModelError, or
    TemplateError for a bad --chat-template, RedisUnavailable for an unusable Redis URL,
    MiddlewareError."""
    router = Router(settings, load_model(settings))
    app = _application(router.front, router.start, router.close)
    app.state.router = router
    add_openai_routes(app, router)
    add_messages_routes(app, router)
    add_responses_routes(app, router)
    add_scale_out_routes(app, router)
    condition = Condition(router.trouble, lambda: router.dispatcher.in_flight)
    _add_common_routes(app, router.front, router.responses, condition)
    return app


def create_render_app(settings: RouterSettings) -> FastAPI:
    """A server without workers: text to tokens, and tokens to answers. Raises as `create_app`."""
    settings = replace(settings, enable_scale_out=True, responses_ttl=0)
    front, desk = Front(settings, load_model(settings)), ResponsesDesk(settings)

    async def start() -> None:
        pass

    app = _application(front, start, front.close)
    _add_common_routes(app, front, desk, Condition(lambda: "", lambda: 0))
    return app


def _add_common_routes(
    app: FastAPI, front: Front, desk: ResponsesDesk, condition: Condition
) -> None:
    """What needs no workers."""
    add_message_counting(app, front)
    add_item_counting(app, front, desk)
    add_render_routes(app, front)
    add_text_routes(app, front)
    add_status_routes(app, front, condition)


def _application(
    front: Front, start: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]
) -> FastAPI:
    """Without routes yet."""
    settings = front.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await start()
        try:
            yield
        finally:
            await close()

    documented = not settings.disable_fastapi_docs
    online = documented and not settings.enable_offline_docs
    app = FastAPI(
        title="pdserve",
        version=version(),
        root_path=settings.root_path,
        lifespan=lifespan,
        docs_url="/docs" if online else None,
        redoc_url="/redoc" if online else None,
        openapi_url="/openapi.json" if documented else None,
    )
    if documented and not online:
        add_offline_docs(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
    )
    for path in settings.middleware:
        add_middleware(app, path)
    app.add_middleware(Gate, keys=settings.api_key, count=front.metrics.http.count)
    _add_error_handlers(app)
    app.openapi = lambda: openapi.document(app, front.model.name)  # type: ignore[method-assign]
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error_response(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def _bad_query(request: Request, error: RequestValidationError) -> Response:
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        return error_response(schema_error(problems, "query"), request.scope)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        known = http_error(error.status_code)
        if error.status_code == 404:
            known.message = f"There is no {request.method} {request.url.path:.200} here."
        elif error.status_code == 405:
            known.message = f"{request.url.path:.200} does not answer to {request.method}."
        known.headers.update(error.headers or {})
        return error_response(known, request.scope)
