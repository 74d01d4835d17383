"""Requests of OpenAI's Responses API as chat's: the same request, said differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pdserve.router.errors import ApiError, BadRequest
from pdserve.router.fields import refuse
from pdserve.router.response_items import continues, items_of, messages_of
from pdserve.router.schemas import (
    ChatCompletionRequest,
    ResponsesFields,
    ResponsesRequest,
    parse,
)
from pdserve.router.speech import Speech
from pdserve.router.tool_use import ALLOWED

Json = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
SAME = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "seed", "stop", "ignore_eos", "skip_special_tokens",
        "include_stop_str_in_output", "include_reasoning", "cache_salt", "session_id",
        "priority",
        "stream")  # fmt: skip
"""Fields that chat has under the same name."""
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "messages": "input",
}
"""Fields of chat, and what they are called here."""


def as_chat(
    body: ResponsesFields, items: Sequence[Json], earlier: int, auto_calls: bool
) -> ChatCompletionRequest:
    """The chat request with the same meaning. `items`: the whole conversation, of which so many
    are `earlier` ones; `auto_calls`: the model may decide to call tools. Raises BadRequest."""
    refuse(body)
    if body.prompt is not None:
        raise BadRequest("prompt template is not supported (parameter=prompt).", param="prompt")
    messages = messages_of(items, earlier)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    partial = continues(items)
    content: Json = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(place, tool) for place, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(body, auto_calls),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "response_format": _response_format(body),
        "structured_outputs": body.structured_outputs,
        "truncate_prompt_tokens": -1 if body.truncation == "auto" else None,
        "continue_final_message": partial,
        "add_generation_prompt": not partial,
    }
    if isinstance(body, ResponsesRequest):
        content |= {name: getattr(body, name) for name in SAME}
        content["max_completion_tokens"] = body.max_output_tokens
        if LOGPROBS in (body.include or ()):
            content |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return parse(ChatCompletionRequest, content)


def chat_of(speech: Speech, body: ResponsesRequest) -> ChatCompletionRequest:
    """The chat request of a response whose conversation is all in its request. Raises
    BadRequest."""
    if body.previous_response_id is not None:
        raise BadRequest(
            "previous_response_id cannot be used here: stored responses are not looked up; send "
            "the whole conversation in input (parameter=previous_response_id).",
            param="previous_response_id",
        )
    earlier = body.previous_input_messages or []
    return as_chat(body, [*earlier, *items_of(body.input)], len(earlier), speech.may_call)


@contextmanager
def in_own_words() -> Iterator[None]:
    """Errors about the chat request get the names that the client knows."""
    try:
        yield
    except ApiError as error:
        field = (error.param or "").removeprefix("body.")
        for name, own in NAMES.items():
            if field == name or field.startswith(f"{name}."):
                error.message = error.message.replace(name, own)
                error.param = own + field.removeprefix(name)
        raise


def _tool(place: int, tool: Json) -> Json:
    where = f"tools.{place}"
    if tool.get("type") != "function":
        raise BadRequest(
            f"{where}.type {tool.get('type')!r:.100} cannot be used, only function: there are no "
            "tools that the server itself executes.",
            param=where,
        )
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def tool_choice_of(body: ResponsesFields) -> str | Json:
    """What the client is told of its tool_choice. Raises BadRequest."""
    choice = body.tool_choice
    if isinstance(choice, dict):
        named = choice.get("type") == "function" and isinstance(choice.get("name"), str)
        if not named and choice.get("type") != ALLOWED:
            raise BadRequest(
                'tool_choice must be auto, none, required, {"type": "function", "name": ...} or '
                f'{{"type": "allowed_tools", "mode": ..., "tools": [...]}}, got {choice!r:.100}.',
                param="tool_choice",
            )
    elif choice not in (None, "auto", "none", "required"):
        raise BadRequest(
            f"tool_choice must be auto, none, required or an object, got {choice!r:.100}.",
            param="tool_choice",
        )
    if body.tools:
        return choice or "auto"
    if choice in (None, "auto", "none"):
        return "none"
    shown = choice if isinstance(choice, str) else choice["type"]
    raise BadRequest(
        f"Tool choice '{shown}' must be specified with 'tools' parameter.", param="tool_choice"
    )


def _tool_choice(body: ResponsesFields, auto_calls: bool) -> str | Json:
    """`tool_choice` of chat. Where the model's calls are not recognised, they are text."""
    choice = tool_choice_of(body)
    if choice == "auto" and not auto_calls:
        return "none"
    if isinstance(choice, str):
        return choice
    if choice["type"] == ALLOWED:
        mode, tools = choice.get("mode"), choice.get("tools")
        if mode == "auto" and not auto_calls:
            return "none"
        if isinstance(tools, list):
            tools = [_named(one) if isinstance(one, dict) else one for one in tools]
        return {"type": ALLOWED, ALLOWED: {"mode": mode, "tools": tools}}
    return _named(choice)


def _named(choice: Json) -> Json:
    """A function as chat names it."""
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _response_format(body: ResponsesFields) -> Json | None:
    """`response_format` of chat."""
    wanted = (body.text or {}).get("format")
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if body.structured_outputs is not None:
        raise BadRequest(
            "structured_outputs cannot be used together with text.format.",
            param="structured_outputs",
        )
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema":
        raise BadRequest(
            f"text.format.type must be text, json_object or json_schema, got {kind!r:.100}.",
            param="text.format",
        )
    if not isinstance(wanted.get("schema"), dict):
        raise BadRequest("text.format.schema must be an object.", param="text.format.schema")
    names = ("name", "schema", "strict", "description")
    return {"type": kind, "json_schema": {name: wanted[name] for name in names if name in wanted}}
