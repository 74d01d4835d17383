"""Conversations as clients send them, checked and in the shape that chat templates expect."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from pdserve.router.chat import Message
from pdserve.router.errors import BadRequest

PARTS = {"text": "text", "refusal": "refusal", "thinking": "thinking", "tool_reference": "name"}
"""Kinds of parts, and the member of each that is its text."""


def check_messages(messages: list[Message]) -> list[Message]:
    """Messages in the shape that templates expect. Raises BadRequest."""
    if not messages:
        raise BadRequest(
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
            param="messages",
        )
    return [_check_message(place, message) for place, message in enumerate(messages)]


def _check_message(place: int, message: Message) -> Message:
    role = message.get("role")
    where = f"messages.{place}"
    if not isinstance(role, str) or not role:
        raise BadRequest(
            f"messages[{place}].role must be a word, such as user or assistant, got {role!r:.100}.",
            param=f"{where}.role",
        )
    checked = dict(message)
    if "reasoning_content" in checked and "reasoning" not in checked:
        checked["reasoning"] = checked["reasoning_content"]
    if checked.get("tool_calls") is not None:
        checked["tool_calls"] = _check_calls(where, checked["tool_calls"])
    content = message.get("content")
    if isinstance(content, list):
        checked["content"] = [
            _check_part(f"{where}.content.{number}", part) for number, part in enumerate(content)
        ]
    elif content is None:
        if "content" in message and role != "assistant":
            raise BadRequest(
                f"messages[{place}].content must be a string or a list of parts, got null.",
                param=f"{where}.content",
            )
        checked["content"] = ""
    elif not isinstance(content, str):
        raise BadRequest(
            f"messages[{place}].content must be a string or a list of parts, "
            f"got a {type(content).__name__}.",
            param=f"{where}.content",
        )
    return checked


def _check_part(where: str, part: Any) -> Message:
    """Every part has its text in `text`; those of their own kind keep their members besides."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        raise BadRequest(
            f"{where}.type must be one of {', '.join(PARTS)} (the model reads text only), "
            f"got {kind!r:.100}.",
            param=where,
        )
    name = PARTS[kind]
    text = part.get(name)
    if not isinstance(text, str):
        raise BadRequest(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return {"type": "text", "text": text} if kind in ("text", "refusal") else {**part, "text": text}


def _check_calls(where: str, calls: Any) -> list[Any]:
    """Tool calls of earlier answers: their arguments, JSON text, become objects for templates."""
    if not isinstance(calls, list):
        raise BadRequest(f"{where}.tool_calls must be a list.", param=f"{where}.tool_calls")
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(
                f"{where}.tool_calls must hold objects with function.name and function.arguments.",
                param=f"{where}.tool_calls",
            )
        arguments: Any = function.get("arguments")
        if not arguments:
            arguments = {}
        elif isinstance(arguments, str):
            # A model's mistake from an earlier turn: the template sees it as it was.
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                arguments = msgspec.json.decode(arguments)
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def flat_text(content: Any) -> str:
    """The text of a message's content, its parts joined by newlines."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return ""
