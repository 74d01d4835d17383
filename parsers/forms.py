"""Calls of tools as structural tags: what a grammar must allow so that a format's parser reads it.

The tags are plain JSON in the notation of `structured_outputs.structural_tag`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

DEFINITIONS = ("$defs", "definitions")
NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called."""

    name: str
    parameters: Json
    """JSON schema of its arguments."""
    strict: bool
    """Its calls are held to the schema wherever they come."""


def required(form: str, tools: Sequence[Tool], one: bool) -> Json:
    """At least one call and nothing else; with `one` exactly one."""
    return FORMS[form](tools, one)


def beside(form: str, tools: Sequence[Tool], one: bool) -> Json:
    """`required`, as one of several things that an answer may be. Where calls are JSON they are
    schemas: a longer literal would hide the brace that other JSON begins with."""
    if form == "llama3_json":
        return _list([_tag("", _call_schema(tool), "") for tool in tools], "; ", one)
    return required(form, tools, one)


def guarded(form: str, tools: Sequence[Tool]) -> Json:
    """Free text in which calls are held to their tools' schemas."""
    if form in TRIGGERS:
        begin, tag = TRIGGERS[form]
        return {"type": "triggered_tags", "triggers": [begin], "tags": [tag(t) for t in tools]}
    free = {"type": "regex", "pattern": rf"(\s*[^\s\{OPENS[form]}](.|\n)*)?"}
    return {"type": "or", "elements": [required(form, tools, False), free]}


def _text(value: str) -> Json:
    return {"type": "const_string", "value": value}


def _tag(begin: str, content: Json, end: str) -> Json:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _arguments(tool: Tool) -> Json:
    """The schema; what the library does not know of it counts only for strict tools."""
    options = {"lenient": not tool.strict}
    return {"type": "json_schema", "json_schema": {**tool.parameters, "x-guidance": options}}


def _object_tag(tool: Tool, begin: str, end: str, key: str = "arguments") -> Json:
    """{"name": …, "arguments": …} between begin and end."""
    head = f'{begin}{{"name": {json.dumps(tool.name)}, "{key}": '
    return _tag(head, _arguments(tool), "}" + end)


def _list(tags: Sequence[Json], separator: str, one: bool) -> Json:
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": one,
    }


def _between(before: str, content: Json, behind: str) -> Json:
    return {"type": "sequence", "elements": [_text(before), content, _text(behind)]}


def _hermes_tag(tool: Tool) -> Json:
    return _object_tag(tool, "<tool_call>\n", "\n</tool_call>")


def _hermes(tools: Sequence[Tool], one: bool) -> Json:
    return _list([_hermes_tag(tool) for tool in tools], "\n", one)


def _llama(tools: Sequence[Tool], one: bool) -> Json:
    return _list([_object_tag(tool, "", "", "parameters") for tool in tools], "; ", one)


def _call_schema(tool: Tool) -> Json:
    shared = {key: value for key, value in tool.parameters.items() if key in DEFINITIONS}
    schema = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": tool.parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        **shared,
        "x-guidance": {"lenient": not tool.strict},
    }
    return {"type": "json_schema", "json_schema": schema}


def _mistral_tag(tool: Tool) -> Json:
    return _object_tag(tool, "[TOOL_CALLS] [", "]")


def _mistral(tools: Sequence[Tool], one: bool) -> Json:
    calls = _list([_object_tag(tool, "", "") for tool in tools], ", ", one)
    return _between("[TOOL_CALLS] [", calls, "]")


def _deepseek_call(tool: Tool) -> Json:
    begin = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{tool.name}\n```json\n"
    return _tag(begin, _arguments(tool), "\n```<｜tool▁call▁end｜>")


def _deepseek_tag(tool: Tool) -> Json:
    call = _deepseek_call(tool)
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    return {**call, "begin": begin + call["begin"], "end": call["end"] + end}


def _deepseek(tools: Sequence[Tool], one: bool) -> Json:
    calls = _list([_deepseek_call(tool) for tool in tools], "\n", one)
    return _between("<｜tool▁calls▁begin｜>", calls, "<｜tool▁calls▁end｜>")


def _properties(tool: Tool) -> list[tuple[str, Json]]:
    """Each parameter with a schema that stands alone."""
    found = tool.parameters.get("properties")
    shared = {key: value for key, value in tool.parameters.items() if key in DEFINITIONS}
    options = {"x-guidance": {"lenient": not tool.strict}}
    return [
        (name, {**(schema if isinstance(schema, dict) else {}), **shared, **options})
        for name, schema in (found if isinstance(found, dict) else {}).items()
    ]


def _python_call(tool: Tool) -> Json:
    parts: list[Json] = [_text(f"{tool.name}(")]
    for place, (name, schema) in enumerate(_properties(tool)):
        parts.append(_text(f"{', ' if place else ''}{name}="))
        parts.append({"type": "json_schema", "json_schema": schema})
    return {"type": "sequence", "elements": [*parts, _text(")")]}


def _pythonic(tools: Sequence[Tool], one: bool) -> Json:
    tags = [_tag("", _python_call(tool), "") for tool in tools]
    return _between("[", _list(tags, ", ", one), "]")


def _coder_value(schema: Json) -> Json:
    """A parameter's value and the end of the parameter."""
    end, values = "\n</parameter>\n", schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(v, str) and v for v in values):
        choice = {"type": "or", "elements": [_text(value) for value in values]}
        return {"type": "sequence", "elements": [choice, _text(end)]}
    if schema.get("type", "string") == "string":
        return _tag("", {"type": "any_text"}, end)
    content = {"type": "json_schema", "json_schema": schema}
    return {"type": "sequence", "elements": [content, _text(end)]}


def _coder_tag(tool: Tool) -> Json:
    parts: list[Json] = [_text(f"\n<function={tool.name}>\n")]
    for name, schema in _properties(tool):
        parts += [_text(f"<parameter={name}>\n"), _coder_value(schema)]
    content = {"type": "sequence", "elements": [*parts, _text("</function>\n")]}
    return _tag("<tool_call>", content, "</tool_call>")


def _coder(tools: Sequence[Tool], one: bool) -> Json:
    return _list([_coder_tag(tool) for tool in tools], "\n", one)


FORMS: dict[str, Callable[[Sequence[Tool], bool], Json]] = {
    "hermes": _hermes,
    "llama3_json": _llama,
    "mistral": _mistral,
    "deepseek_v3": _deepseek,
    "pythonic": _pythonic,
    "qwen3_coder": _coder,
}
TRIGGERS: dict[str, tuple[str, Callable[[Tool], Json]]] = {
    "hermes": ("<tool_call>", _hermes_tag),
    "qwen3_coder": ("<tool_call>", _coder_tag),
    "mistral": ("[TOOL_CALLS]", _mistral_tag),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", _deepseek_tag),
}
"""Where free text may turn into calls, and one call from there on."""
OPENS = {"llama3_json": "{", "pythonic": "["}
"""First characters of answers that are calls, for the others."""
