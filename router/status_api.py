"""The routes about the server itself: its models, its health, its load."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.responses import RedirectResponse, Response

from pdserve.cluster.records import ROUTER_HEADER
from pdserve.router import metrics as router_metrics
from pdserve.router.errors import NotFound, Unavailable
from pdserve.router.front import Front
from pdserve.router.http import JsonResponse
from pdserve.router.openai import encode_json
from pdserve.router.served import version


@dataclass(frozen=True, slots=True)
class Condition:
    """What a server says about itself when asked."""

    trouble: Callable[[], str]
    """Why no request can be served now, as a sentence; "" if they can."""
    in_flight: Callable[[], int]
    """Answers that are being generated."""

    def check(self) -> None:
        """Raises Unavailable."""
        trouble = self.trouble()
        if trouble:
            raise Unavailable(trouble)


def add_status_routes(app: FastAPI, front: Front, condition: Condition) -> None:
    _add_model_routes(app, front, condition)
    _add_health_routes(app, condition)
    _add_figure_routes(app, front, condition)


def _add_model_routes(app: FastAPI, front: Front, condition: Condition) -> None:
    @app.get("/v1/models", response_class=JsonResponse, summary="The models that can be asked for")
    async def models() -> Response:
        names = () if condition.trouble() else front.model.names
        return JsonResponse(
            encode_json({"object": "list", "data": [front.model_card(name) for name in names]})
        )

    @app.get("/v1/models/{name:path}", response_class=JsonResponse, summary="One model")
    async def model(request: Request, name: str) -> Response:
        if not name:
            return RedirectResponse(request.url_for("models"), status_code=307)
        if name not in front.model.names:
            raise NotFound(f"The model `{name:.200}` does not exist.", param="model")
        condition.check()
        return JsonResponse(encode_json(front.model_card(name)))


def _add_health_routes(app: FastAPI, condition: Condition) -> None:
    async def health() -> Response:
        condition.check()
        return Response(status_code=200, headers={ROUTER_HEADER: str(os.getpid())})

    app.add_api_route(
        "/health", health, methods=["GET"], summary="200 while requests can be served, else 503"
    )
    app.add_api_route(
        "/ping", health, methods=["GET"], summary="The same as /health", operation_id="ping_get"
    )
    app.add_api_route(
        "/ping", health, methods=["POST"], summary="The same as /health", operation_id="ping_post"
    )


def _add_figure_routes(app: FastAPI, front: Front, condition: Condition) -> None:
    @app.get("/version", summary="The release")
    async def show_version() -> Response:
        return JsonResponse(encode_json({"version": version()}))

    @app.get("/load", summary="Answers in flight at this router")
    async def load() -> Response:
        return JsonResponse(encode_json({"server_load": condition.in_flight()}))

    @app.get("/kv_event_sources", summary="Publishers of KV events, of which there are none")
    async def kv_event_sources() -> Response:
        return JsonResponse(b"{}")

    @app.get("/metrics", summary="Counters and histograms in Prometheus' text format")
    async def metrics() -> Response:
        return Response(front.metrics.text(), headers={"content-type": router_metrics.CONTENT_TYPE})
