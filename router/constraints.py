"""What a request says about the form of its answer, as at most one wish for a grammar."""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.router.errors import BadRequest
from pdserve.router.grammar_check import Wish

Json = dict[str, Any]

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
ANY_OBJECT: Json = {"type": "object"}


def wish_of(response_format: Json | None, structured: Json | None) -> Wish | None:
    """None: any text. Raises BadRequest."""
    wishes = [
        wish
        for wish in (_format_wish(response_format), _structured_wish(structured))
        if wish is not None
    ]
    if len(wishes) > 1:
        raise BadRequest(
            "response_format and structured_outputs were both given; only use one kind of "
            "structured outputs constraint.",
            param="structured_outputs",
        )
    return wishes[0] if wishes else None


def _format_wish(given: Json | None) -> Wish | None:
    kind, param = (given or {}).get("type", "text" if given is None else None), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return Wish("json", ANY_OBJECT, param)
    if kind == "json_schema":
        return Wish("json", _named_schema(given or {}), param)
    if kind == "structural_tag":
        return Wish("structural_tag", given, param)
    raise BadRequest(
        "response_format.type must be text, json_object, json_schema or structural_tag, got "
        f"{kind!r:.100} (parameter=response_format).",
        param=param,
    )


def _named_schema(given: Json) -> Any:
    named = given.get("json_schema")
    if not isinstance(named, dict):
        raise BadRequest(
            "response_format of type json_schema needs a member json_schema, an object with name "
            "and schema (parameter=response_format).",
            param="response_format",
        )
    schema = named.get("schema", named.get("json_schema"))
    if schema is None:
        return {}
    if not isinstance(schema, (dict, bool)):
        raise BadRequest(
            "response_format.json_schema.schema must be a JSON schema: an object "
            "(parameter=response_format).",
            param="response_format",
        )
    return schema


def _structured_wish(given: Json | None) -> Wish | None:
    if given is None:
        return None
    param = "structured_outputs"
    named = [kind for kind in KINDS if given.get(kind) is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise BadRequest(
            f"structured_outputs must have exactly one of {', '.join(KINDS)}, got {found}: you can "
            "only use one kind of constraint.",
            param=param,
        )
    kind = named[0]
    options = _options(given)
    if kind == "json_object":
        if given[kind] is not True:
            raise _bad(kind, "must be true", given[kind])
        return Wish("json", ANY_OBJECT, param, options)
    check = {
        "json": _json_text,
        "structural_tag": _json_text,
        "regex": _pattern,
        "grammar": _text,
        "choice": _choices,
    }[kind]
    return Wish(kind, check(kind, given[kind]), param, options if kind == "json" else {})


def _options(given: Json) -> Json:
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    for name, value in options.items():
        wanted = str if name == "whitespace_pattern" else bool
        if not isinstance(value, wanted):
            raise _bad(name, "must be a pattern" if wanted is str else "must be a boolean", value)
    return options


def _bad(member: str, rule: str, value: Any) -> BadRequest:
    return BadRequest(
        f"structured_outputs.{member} {rule}, got {value!r:.100}.", param="structured_outputs"
    )


def _json_text(member: str, value: Any) -> Any:
    """An object, or the same as JSON text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _bad(member, f"must be an object or JSON text of one ({error})", value) from None
    if not isinstance(value, (dict, bool)):
        raise _bad(member, "must be an object or JSON text of one", value)
    return value


def _text(member: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad(member, "must be a text that is not empty", value)
    return value


def _pattern(member: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _bad(member, "must be a regular expression, not empty and without NUL", value)
    return value


def _choices(member: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise _bad(member, "must be a list of texts, none of them empty", value)
    return texts
