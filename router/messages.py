"""Anthropic's conversations as chat's: the same request, said differently."""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.router.errors import BadRequest
from pdserve.router.fields import refuse
from pdserve.router.schemas import ChatCompletionRequest, MessagesFields, MessagesRequest, parse

BILLING = "x-anthropic-billing-header"
"""Begins a system block that is different in each request and not meant for the model."""
LEAST_BUDGET = 1024

Json = dict[str, Any]


def as_chat(body: MessagesFields, least_effort: str) -> ChatCompletionRequest:
    """The chat request with the same meaning; without thinking its effort is `least_effort`. Raises
    BadRequest."""
    refuse(body)
    _check_thinking(body)
    messages = _messages(body)
    last = messages[-1] if messages else {}
    prefilled = last.get("role") == "assistant" and bool(last.get("content"))
    content: Json = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(place, tool) for place, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": _parallel(body.tool_choice),
        "chat_template_kwargs": body.chat_template_kwargs,
        "reasoning_effort": _effort(body, least_effort),
        "response_format": _response_format(body),
        "continue_final_message": prefilled,
        "add_generation_prompt": not prefilled,
    }
    if isinstance(body, MessagesRequest):
        content |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "cache_salt": body.cache_salt,
            "thinking_token_budget": _budget(body.thinking or {}),
        }
    return parse(ChatCompletionRequest, content)


def _messages(body: MessagesFields) -> list[Json]:
    """System texts first, wherever they stood; then the turns."""
    systems = [_system_text("system", body.system)] if body.system else []
    turns: list[Json] = []
    if not body.messages:
        raise BadRequest("messages must hold at least one message.", param="messages")
    for place, message in enumerate(body.messages):
        where, role, content = f"messages.{place}", message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise BadRequest(
                f"{where}.role must be user, assistant or system, got {role!r:.100}.",
                param=f"{where}.role",
            )
        if not isinstance(content, (str, list)):
            raise BadRequest(
                f"{where}.content must be a string or a list of blocks, "
                f"got a {type(content).__name__}.",
                param=f"{where}.content",
            )
        if role == "system":
            systems.append(_system_text(f"{where}.content", content))
        elif isinstance(content, str):
            turns.append({"role": role, "content": content})
        else:
            turn = _user if role == "user" else _assistant
            turns += turn(f"{where}.content", content)
    system = "\n\n".join(filter(None, systems))
    return [{"role": "system", "content": system}, *turns] if system else turns


def _system_text(where: str, content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = [_text(f"{where}.{n}", block) for n, block in enumerate(content)]
    return "".join(text for text in texts if not text.startswith(BILLING))


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _text(where: str, block: Any) -> str:
    """The text of a text block, where nothing else may stand."""
    if _kind(block) != "text":
        raise _no_block(where, block, "text")
    return _string(where, block, "text")


def _string(where: str, block: Json, name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _no_block(where: str, block: Any, allowed: str) -> BadRequest:
    kind = _kind(block)
    reason = " (the model reads text only)" if kind in ("image", "document") else ""
    return BadRequest(
        f"{where}: a block of type {kind!r:.100} cannot be used here{reason}; allowed: {allowed}.",
        param=where,
    )


def _user(where: str, blocks: list[Any]) -> list[Json]:
    """Texts are one message; each tool result is one of its own, in the order of the blocks."""
    turns: list[Json] = []
    for number, block in enumerate(blocks):
        place = f"{where}.{number}"
        if _kind(block) == "tool_result":
            turns.append(
                {
                    "role": "tool",
                    "tool_call_id": _string(place, block, "tool_use_id"),
                    "content": _result(place, block),
                }
            )
        elif _kind(block) in ("text", "tool_reference"):
            part = _part(place, block)
            if not turns or turns[-1]["role"] != "user":
                turns.append({"role": "user", "content": []})
            turns[-1]["content"].append(part)
        else:
            raise _no_block(place, block, "text, tool_result, tool_reference")
    return turns or [{"role": "user", "content": ""}]


def _part(where: str, block: Json) -> Json:
    """A part of chat's."""
    if _kind(block) == "tool_reference":
        return {"type": "tool_reference", "name": _string(where, block, "tool_name")}
    if _kind(block) != "text":
        raise _no_block(where, block, "text, tool_reference")
    return {"type": "text", "text": _string(where, block, "text")}


def _result(where: str, block: Json) -> str | list[Json]:
    """The content of a tool's result: one text, unless there is more in it. Templates have no word
    for a failed one: its text says it."""
    content, failed = block.get("content"), block.get("is_error")
    if failed is not None and not isinstance(failed, bool):
        raise BadRequest(f"{where}.is_error must be a boolean.", param=f"{where}.is_error")
    where = f"{where}.content"
    if content is not None and not isinstance(content, (str, list)):
        raise BadRequest(f"{where} must be a string or a list of blocks.", param=where)
    listed = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    parts = [_part(f"{where}.{number}", one) for number, one in enumerate(listed)]
    if any(part["type"] != "text" for part in parts):
        return [{"type": "text", "text": ERROR}, *parts] if failed else parts
    text = "\n".join(part["text"] for part in parts)
    return f"{ERROR}{text}" if failed and not text.lstrip().lower().startswith("error") else text


ERROR = "Error: "


def _assistant(where: str, blocks: list[Any]) -> list[Json]:
    """One message: its texts joined, its thoughts, its calls of tools."""
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        place, kind = f"{where}.{number}", _kind(block)
        if kind == "text":
            texts.append(_string(place, block, "text"))
        elif kind == "thinking":
            thoughts.append(_string(place, block, "thinking"))
        elif kind == "tool_use":
            calls.append(_call(place, block))
        elif kind != "redacted_thinking":
            raise _no_block(place, block, "text, thinking, redacted_thinking, tool_use")
    turn: Json = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        turn["reasoning"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [turn]


def _call(where: str, block: Json) -> Json:
    arguments = msgspec.json.encode(block.get("input") or {}).decode()
    function = {"name": _string(where, block, "name"), "arguments": arguments}
    return {"id": _string(where, block, "id"), "type": "function", "function": function}


def _tool(place: int, tool: Json) -> Json:
    where = f"tools.{place}"
    if tool.get("type") not in (None, "custom"):
        raise BadRequest(
            f"{where}.type {tool['type']!r:.100} cannot be used: there are no tools that the "
            "server itself executes.",
            param=where,
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise BadRequest(f"{where}.input_schema must be an object.", param=f"{where}.input_schema")
    function = {
        "name": _string(where, tool, "name"),
        "description": tool.get("description") or "",
        "parameters": {"type": "object", **schema},
    }
    function |= {name: tool[name] for name in ("strict", "defer_loading") if tool.get(name) is True}
    return {"type": "function", "function": function}


def _tool_choice(choice: Json | None) -> str | Json | None:
    if choice is None:
        return None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": _string("tool_choice", choice, "name")}}
    words = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in words:
        raise BadRequest(
            f"tool_choice.type must be auto, any, tool or none, got {kind!r:.100}.",
            param="tool_choice.type",
        )
    return words[kind]


def _budget(thinking: Json) -> Any:
    return thinking.get("budget_tokens") if thinking.get("type") == "enabled" else None


def _parallel(choice: Json | None) -> bool | None:
    disabled = (choice or {}).get("disable_parallel_tool_use")
    if disabled is not None and not isinstance(disabled, bool):
        raise BadRequest(
            f"tool_choice.disable_parallel_tool_use must be a boolean, got {disabled!r:.100}.",
            param="tool_choice.disable_parallel_tool_use",
        )
    return None if disabled is None else not disabled


def _check_thinking(body: MessagesFields) -> None:
    thinking = body.thinking
    kind = "disabled" if thinking is None else thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise BadRequest(
            f"thinking.type must be enabled, disabled or adaptive, got {kind!r:.100}.",
            param="thinking.type",
        )
    if kind != "enabled" or not isinstance(body, MessagesRequest):
        return
    assert thinking is not None
    budget = thinking.get("budget_tokens")
    if type(budget) is not int or not LEAST_BUDGET <= budget < body.max_tokens:
        raise BadRequest(
            f"thinking.budget_tokens must be at least {LEAST_BUDGET} and less than "
            f"max_tokens={body.max_tokens}, got {budget!r:.100}.",
            param="thinking.budget_tokens",
        )


def _effort(body: MessagesFields, least: str) -> Any:
    """`reasoning_effort` of chat."""
    if body.thinking is not None and body.thinking.get("type") == "disabled":
        return least
    return (body.output_config or {}).get("effort")


def _response_format(body: MessagesFields) -> Json | None:
    """`response_format` of chat."""
    wanted = (body.output_config or {}).get("format")
    if wanted is None:
        return None
    schema = wanted.get("schema") if isinstance(wanted, dict) else None
    if not isinstance(schema, dict) or wanted.get("type") != "json_schema":
        raise BadRequest(
            "output_config.format must be an object of type json_schema with a schema.",
            param="output_config.format",
        )
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
