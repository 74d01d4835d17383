"""Items of the Responses API as messages of chat."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from pdserve.router.errors import BadRequest

Json = dict[str, Any]

PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Kinds of content parts, and the member that holds their text."""
ROLES = ("user", "assistant", "system", "developer")
PARTIAL = ("in_progress", "incomplete")
"""Status of an assistant's message that is to be continued."""
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
"""Of the ids of items."""


def new_id(kind: object) -> str:
    """Of an item of this type."""
    prefix = PREFIXES.get(kind, "item") if isinstance(kind, str) else "item"
    return f"{prefix}_{secrets.token_hex(16)}"


def items_of(given: str | list[Json]) -> list[Json]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def complete(items: Sequence[Json]) -> list[Json]:
    """Items that have been understood, as they are stored: with types, ids and statuses."""
    return [_completed(item) for item in items]


def _completed(item: Json) -> Json:
    kind = item.get("type") or "message"
    found = {"id": new_id(kind), "status": "completed", **_without_null(item), "type": kind}
    if kind == "message" and isinstance(found.get("content"), str):
        part = "output_text" if found.get("role") == "assistant" else "input_text"
        found["content"] = [{"type": part, "text": found["content"]}]
    elif kind == "reasoning":
        found.setdefault("summary", [])
    return found


def _without_null(item: Json) -> Json:
    """Items of answers hold members that are null; what is null has not been said."""
    return {name: value for name, value in item.items() if value is not None}


def continues(items: Sequence[Json]) -> bool:
    """The last item is a message of the assistant that has not ended."""
    last = items[-1] if items else {}
    message = last.get("type", "message") == "message"
    return message and last.get("role") == "assistant" and last.get("status") in PARTIAL


def messages_of(items: Sequence[Json], earlier: int = 0) -> list[Json]:
    """`earlier`: so many items at the beginning are those of earlier responses. Raises
    BadRequest."""
    turns = _Turns()
    for place, item in enumerate(items, start=-earlier):
        turns.take(f"input.{place}" if place >= 0 else "previous_response_id", item)
    return turns.messages


class _Turns:
    """Thoughts, text and calls of the assistant that follow each other are one message."""

    def __init__(self) -> None:
        self.messages: list[Json] = []

    def take(self, where: str, item: Json) -> None:
        kind = item.get("type") or "message"
        if kind == "message":
            self._message(where, item)
        elif kind == "reasoning":
            thoughts = _thoughts(where, item)
            if thoughts:
                self._assistant(fresh=True)["reasoning"] = thoughts
        elif kind == "function_call":
            self._assistant(fresh=False).setdefault("tool_calls", []).append(_call(where, item))
        elif kind == "function_call_output":
            answered = _string(where, item, "call_id")
            content = _text(f"{where}.output", item.get("output"))
            self.messages.append({"role": "tool", "tool_call_id": answered, "content": content})
        else:
            raise BadRequest(
                f"{where}: an item of type {kind!r:.100} cannot be used; allowed: message, "
                "reasoning, function_call, function_call_output.",
                param=where,
            )

    def _message(self, where: str, item: Json) -> None:
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise BadRequest(
                f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.100}.",
                param=f"{where}.role",
            )
        if role == "assistant":
            self._assistant(fresh=True)["content"] = _text(f"{where}.content", content)
        elif isinstance(content, list):
            parts = [_part(f"{where}.content.{n}", part) for n, part in enumerate(content)]
            listed = [{"type": "text", "text": text} for text in parts]
            self.messages.append({"role": role, "content": listed})
        else:
            self.messages.append({"role": role, "content": _text(f"{where}.content", content)})

    def _assistant(self, fresh: bool) -> Json:
        """The assistant's message that is being put together. `fresh`: one that holds neither text
        nor calls."""
        last = self.messages[-1] if self.messages else {}
        spoken = last.get("content") or last.get("tool_calls")
        if last.get("role") != "assistant" or (fresh and spoken):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last


def _string(where: str, item: Json, name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts.", param=where)
    return "".join(_part(f"{where}.{number}", part) for number, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        raise BadRequest(
            f"Unsupported chat content part type: {kind!r:.100}. The model reads text only; "
            f"{where}.type must be one of {', '.join(PARTS)}.",
            param=where,
        )
    return _string(where, part, PARTS[kind])


def _thoughts(where: str, item: Json) -> str:
    """The content, or else the summary."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise BadRequest(f"{where}.{name} must be a list of parts.", param=f"{where}.{name}")
        texts = [_string(f"{where}.{name}.{n}", part, "text") for n, part in enumerate(parts)]
        if texts:
            return "\n".join(texts)
    return ""


def _call(where: str, item: Json) -> Json:
    function = {
        "name": _string(where, item, "name"),
        "arguments": _string(where, item, "arguments"),
    }
    return {"id": _string(where, item, "call_id"), "type": "function", "function": function}
