"""The OpenAPI document of routes that read their bodies themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from pdserve.router.schemas import BODIES

Json = dict[str, Any]


def body_of(*kinds: type[Any]) -> Json:
    """The `openapi_extra` of a route that takes any of these bodies."""
    references = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI) -> Json:
    """FastAPI's document with those bodies."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(body, "validation") for body in BODIES],
            ref_template="#/components/schemas/{model}",
        )
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions.get("$defs", {}))
        app.openapi_schema = found
    return app.openapi_schema
