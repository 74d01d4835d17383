"""Tools of a request: what the client lets the model call, and what follows for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.parsers.forms import NO_PARAMETERS, Tool, beside, guarded, required
from pdserve.router.constraints import wish_of
from pdserve.router.errors import BadRequest
from pdserve.router.grammar_check import Wish
from pdserve.router.parts import part_of
from pdserve.router.schemas import ChatCompletionRequest

Json = dict[str, Any]

NO_PARSER = "requires --tool-call-parser to be set"
ALLOWED = "allowed_tools"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What is to be done about tools."""

    parse: bool = False
    """Look for calls in the answer."""
    wish: Wish | None = None
    """The form of the answer, by its tools or by what else the client said of it."""
    tools: tuple[Tool, ...] = ()

    @property
    def schemas(self) -> dict[str, Json]:
        return {tool.name: tool.parameters for tool in self.tools}


def tool_use(body: ChatCompletionRequest, parser: str | None, auto: bool) -> ToolUse:
    """`parser`: the format that the model writes; `auto`: the model may decide to call by itself.
    Raises BadRequest."""
    if body.tools is not None and not body.tools:
        raise BadRequest("tools must not be an empty list (parameter=tools).", param="tools")
    other = wish_of(body.response_format, body.structured_outputs)
    choice = body.tool_choice
    if choice is None:
        choice = "auto" if body.tools else "none"
    if choice == "none":
        return ToolUse(wish=other)
    if not body.tools:
        raise BadRequest("tool_choice needs tools (parameter=tool_choice).", param="tool_choice")
    tools = tuple(_tool(place, tool) for place, tool in enumerate(body.tools))
    some = isinstance(choice, dict) and choice.get("type") == ALLOWED
    if some:
        choice, tools = _allowed(choice, tools)
    one = body.parallel_tool_calls is False
    param = "tools" if body.tool_choice is None else "tool_choice"
    if choice == "auto":
        if parser is None or not auto:
            raise BadRequest(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to '
                f"be set (parameter={param}).",
                param=param,
            )
        if other is not None:
            return ToolUse(True, _either(beside(parser, tools, one), other), tools)
        held = some or any(tool.strict for tool in tools)
        return ToolUse(True, _wish(guarded(parser, tools)) if held else None, tools)
    if choice == "required":
        if parser is None:
            raise BadRequest(f'tool_choice="required" {NO_PARSER}.', param=param)
        return ToolUse(True, _wish(required(parser, tools, one)), tools)
    named = _named(choice, tools)
    if parser is None:
        raise BadRequest(f'tool_choice=function "{named.name}" {NO_PARSER}.', param=param)
    if other is not None:
        raise BadRequest(
            "You can only either use constraints for structured outputs or tools, not both "
            f"({other.param} and a named tool_choice).",
            param=other.param,
        )
    return ToolUse(True, _wish(required(parser, (named,), True)), tools)


def _wish(form: Json) -> Wish:
    return Wish("structural_tag", {"format": form}, "tools")


def _either(calls: Json, other: Wish) -> Wish:
    """Calls and nothing else, or an answer of the form that the client wants of answers."""
    part = part_of(other.kind, other.value, other.options)
    return Wish(
        "structural_tag", {"format": {"type": "or", "elements": [calls, part]}}, other.param
    )


def _allowed(choice: Any, tools: Sequence[Tool]) -> tuple[str, tuple[Tool, ...]]:
    """OpenAI's allowed_tools: "auto" or "required", and which of the tools may be called. The
    template still tells the model of all of them."""
    allowed = choice.get(ALLOWED)
    parts = allowed if isinstance(allowed, dict) else {}
    mode, some = parts.get("mode"), parts.get("tools")
    if mode not in ("auto", "required") or not isinstance(some, list) or not some:
        raise BadRequest(
            'tool_choice.allowed_tools must be {"mode": "auto" or "required", "tools": [...]} with '
            f"at least one tool, got {allowed!r:.100}.",
            param="tool_choice",
        )
    names = {_named(one, tools).name for one in some}
    return mode, tuple(tool for tool in tools if tool.name in names)


def _named(choice: Any, tools: Sequence[Tool]) -> Tool:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise BadRequest(
            'tool_choice must be "none", "auto", "required", {"type": "function", "function": '
            '{"name": ...}} or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": '
            f"[...]}}}}, got {choice!r:.100}.",
            param="tool_choice",
        )
    for tool in tools:
        if tool.name == name:
            return tool
    raise BadRequest(
        f"The tool with name {name!r:.100} is not found in the tools list (parameter=tool_choice).",
        param="tool_choice",
    )


def _tool(place: int, tool: Json) -> Tool:
    where = f"tools.{place}"
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise BadRequest(
            f'{where} must be of the form {{"type": "function", "function": {{...}}}}.',
            param="tools",
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        raise BadRequest(
            f"{where}.function.name must have 1 to {MAX_NAME} characters.", param="tools"
        )
    if parameters is None:
        parameters = NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise BadRequest(f"{where}.function.parameters must be a JSON schema.", param="tools")
    return Tool(name, parameters, function.get("strict") is True)


MAX_NAME = 256
