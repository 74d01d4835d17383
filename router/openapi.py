"""The OpenAPI document of routes that read their bodies themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from pdserve.router.bodies import BODIES
from pdserve.router.examples import example_of
from pdserve.router.http import JsonResponse

Json = dict[str, Any]
Route = TypeVar("Route", bound=Callable[..., Awaitable[Response]])

_REFERENCE = "#/components/schemas/{model}"
_BY_NAME = {body.__name__: body for body in BODIES}
_OPEN = ("/health", "/kv_event_sources", "/load", "/metrics", "/ping", "/version")
"""Paths that never answer 4xx by themselves."""

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "oneOf": [
                {
                    "type": "object",
                    "required": ["message", "type"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": "integer"},
                    },
                },
                {"const": "Unauthorized"},
            ]
        },
    },
}


def body_of(*kinds: type[Any]) -> Json:
    """The `openapi_extra` of a route that takes any of these bodies."""
    references = [{"$ref": _REFERENCE.format(model=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def json_post(
    app: FastAPI, path: str, summary: str, *kinds: type[BaseModel]
) -> Callable[[Route], Route]:
    """Registers what answers POST with JSON, for any of these bodies."""
    return app.post(
        path, openapi_extra=body_of(*kinds), response_class=JsonResponse, summary=summary
    )


def document(app: FastAPI, model: str) -> Json:
    """FastAPI's document with those bodies, an example of each for the served `model`, and the
    errors."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template=_REFERENCE
        )
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas.clear()  # FastAPI's own errors, which are not ours
        schemas.update(definitions.get("$defs", {}), Error=_ERROR)
        for path, methods in found["paths"].items():
            for operation in methods.values():
                _complete(operation, path, model)
        app.openapi_schema = found
    return app.openapi_schema


def _complete(operation: Json, path: str, model: str) -> None:
    """Put examples and errors into an operation."""
    responses = operation["responses"]
    responses.pop("422", None)
    refused = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    responses["5XX"] = {"description": "Not served now; see the message", "content": refused}
    if path not in _OPEN:
        responses["4XX"] = {"description": "Refused; the message says why", "content": refused}
    body = operation.get("requestBody")
    if body is None:
        return
    content = body["content"]["application/json"]
    schema = content["schema"]
    names = [one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])]
    examples = {name: example_of(_BY_NAME[name], model) for name in names}
    content["examples"] = {
        name: {"value": value} for name, value in examples.items() if value is not None
    }
    if "stream" in _BY_NAME[names[0]].model_fields and not path.endswith("/render"):
        frames = {"schema": {"type": "string", "description": "Server-sent events"}}
        responses["200"]["content"]["text/event-stream"] = frames
