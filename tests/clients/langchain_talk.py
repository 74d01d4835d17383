"""LangChain's ChatOpenAI calls a tool, gets its result and answers. Usage: langchain_talk.py URL"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Literal

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from talk import COUNT, DONE, QUESTION


@tool
def scale(kind: Literal["prefill", "decode"], count: Annotated[int, Field(ge=1, le=COUNT)]) -> str:
    """Start workers of a kind."""
    return DONE.format(kind=kind, count=count)


class Scaled(BaseModel):
    """What was done."""

    kind: Literal["prefill", "decode"]
    enough: bool


def ask(model: Any, messages: list[Any], stream: bool) -> tuple[AIMessage, int]:
    """The answer, and in how many pieces with something in them it came."""
    if not stream:
        return model.invoke(messages), 1
    chunks = list(model.stream(messages))
    answer = chunks[0]
    for chunk in chunks[1:]:
        answer += chunk
    return answer, sum(bool(chunk.content or chunk.tool_call_chunks) for chunk in chunks)


def talk(model: ChatOpenAI, choice: str, stream: bool) -> dict[str, Any]:
    messages: list[Any] = [HumanMessage(QUESTION)]
    forced = model.bind_tools([scale], tool_choice=choice, strict=True, parallel_tool_calls=False)
    asked, begun = ask(forced, messages, stream)
    results = [scale.invoke(call) for call in asked.tool_calls]
    answer, ended = ask(
        model.bind_tools([scale], strict=True), [*messages, asked, *results], stream
    )
    usages = [asked.usage_metadata or {}, answer.usage_metadata or {}]
    return {
        "calls": [(call["name"], call["args"]) for call in asked.tool_calls],
        "results": [result.content for result in results],
        "text": answer.text,
        "prompt_tokens": [usage.get("input_tokens") for usage in usages],
        "pieces": [begun, ended],
    }


def main(url: str) -> None:
    model = ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120,
        temperature=0, max_tokens=300, stream_usage=True,
    )  # fmt: skip
    talks = {
        f"{choice} {'streamed' if stream else 'whole'}": talk(model, choice, stream)
        for choice in ("required", "scale")
        for stream in (False, True)
    }
    form = model.with_structured_output(Scaled, method="json_schema").invoke(QUESTION)
    print(json.dumps({"talks": talks, "form": form.model_dump()}))


main(sys.argv[1])
