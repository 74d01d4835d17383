"""Parts of structural tags: what else can be said about the form of an answer, as one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def part_of(kind: str, value: Any, options: Mapping[str, Any]) -> Json:
    """A wish (see `grammars`) as a part, to stand among others."""
    if kind == "json":
        return {"type": "json_schema", "json_schema": _schema(value, options)}
    if kind == "regex":
        return {"type": "regex", "pattern": value}
    if kind == "choice":
        texts = [{"type": "const_string", "value": text} for text in value]
        return {"type": "or", "elements": texts}
    if kind == "grammar":
        return {"type": "grammar", "grammar": value}
    if "structures" in value:
        return {**value, "type": "structures"}
    part: Json = value.get("format")
    return part


def _schema(schema: Any, options: Mapping[str, Any]) -> Any:
    if options.get("disable_additional_properties"):
        schema = closed(schema)
    blanks: Json = {}
    if options.get("disable_any_whitespace"):
        blanks["whitespace_flexible"] = False
    if options.get("whitespace_pattern"):
        blanks["whitespace_pattern"] = options["whitespace_pattern"]
    if not blanks:
        return schema
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return {**schema, "x-guidance": blanks}


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` in every object that says nothing of them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    if "properties" in found or found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found
