"""LiteLLM calls a tool, gets its result and answers. Usage: litellm_talk.py URL"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from talk import COUNT, DONE, QUESTION

TOOL = {
    "type": "function",
    "function": {
        "name": "scale",
        "description": "Start workers of a kind.",
        "parameters": {
            "type": "object",
            "properties": {
                "kind": {"type": "string", "enum": ["prefill", "decode"]},
                "count": {"type": "integer", "minimum": 1, "maximum": COUNT},
            },
            "required": ["kind", "count"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "scale"}}


def ask(options: dict[str, Any], stream: bool) -> tuple[Any, int]:
    """The answer, and in how many pieces with something in them it came."""
    if not stream:
        return litellm.completion(**options), 1
    usage = {"include_usage": True}
    chunks = list(litellm.completion(**options, stream=True, stream_options=usage))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    pieces = sum(bool(delta.content or delta.tool_calls) for delta in deltas)
    return litellm.stream_chunk_builder(chunks, messages=options["messages"]), pieces


def talk(base: dict[str, Any], choice: Any, stream: bool) -> dict[str, Any]:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    options = {**base, "messages": messages, "tools": [TOOL]}
    asked, begun = ask({**options, "tool_choice": choice, "parallel_tool_calls": False}, stream)
    message = asked.choices[0].message
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]
    results = [DONE.format(**arguments) for _, arguments in calls]
    messages.append(message.model_dump())
    for call, result in zip(message.tool_calls or [], results, strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer, ended = ask(options, stream)
    return {
        "calls": calls,
        "results": results,
        "text": answer.choices[0].message.content,
        "prompt_tokens": [asked.usage.prompt_tokens, answer.usage.prompt_tokens],
        "pieces": [begun, ended],
    }


def main(url: str) -> None:
    base = {
        "model": "openai/demo", "api_base": f"{url}/v1", "api_key": "none",
        "max_retries": 0, "timeout": 120, "temperature": 0, "max_tokens": 300,
    }  # fmt: skip
    talks = {
        f"{name} {'streamed' if stream else 'whole'}": talk(base, choice, stream)
        for name, choice in (("required", "required"), ("scale", NAMED))
        for stream in (False, True)
    }
    print(json.dumps({"talks": talks}))


main(sys.argv[1])
