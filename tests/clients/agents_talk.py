"""The OpenAI Agents SDK calls a tool, gets its result and answers. Usage: agents_talk.py URL"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import Field
from talk import COUNT, DONE, QUESTION


@function_tool
def scale(kind: Literal["prefill", "decode"], count: Annotated[int, Field(ge=1, le=COUNT)]) -> str:
    """Start workers of a kind."""
    return DONE.format(kind=kind, count=count)


def settings(choice: str) -> ModelSettings:
    return ModelSettings(
        temperature=0,
        max_tokens=300,
        tool_choice=choice,
        parallel_tool_calls=False,
        include_usage=True,
    )


async def run(agent: Agent[Any], stream: bool) -> tuple[Any, list[int]]:
    """The result, and in how many deltas arguments and text came."""
    if not stream:
        return await Runner.run(agent, QUESTION, max_turns=3), [1, 1]
    result = Runner.run_streamed(agent, QUESTION, max_turns=3)
    kinds = [
        event.data.type
        async for event in result.stream_events()
        if event.type == "raw_response_event"
    ]
    arguments = kinds.count("response.function_call_arguments.delta")
    return result, [arguments, kinds.count("response.output_text.delta")]


async def talk(model: Any, choice: str, stream: bool) -> dict[str, Any]:
    agent = Agent(name="Scaler", model=model, tools=[scale], model_settings=settings(choice))
    result, pieces = await run(agent, stream)
    items = result.new_items
    calls = [item.raw_item for item in items if item.type == "tool_call_item"]
    return {
        "calls": [(call.name, json.loads(call.arguments)) for call in calls],
        "results": [item.output for item in items if item.type == "tool_call_output_item"],
        "text": result.final_output,
        "prompt_tokens": [response.usage.input_tokens for response in result.raw_responses],
        "pieces": pieces,
    }


async def main(url: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    async with client:
        model = OpenAIChatCompletionsModel(model="demo", openai_client=client)
        talks = {
            f"{choice} {'streamed' if stream else 'whole'}": await talk(model, choice, stream)
            for choice in ("required", "scale")
            for stream in (False, True)
        }
    print(json.dumps({"talks": talks}))


asyncio.run(main(sys.argv[1]))
