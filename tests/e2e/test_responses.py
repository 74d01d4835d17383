"""/v1/responses of the demo model, through 2 routers, a prefill and a decode worker."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from live_cluster import Cluster
from openai import OpenAI
from pydantic import BaseModel, Field

pytestmark = pytest.mark.timeout(240)
HEADER = "x-pdserve-router"
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--routers", 2, "--prefill", 1, "--decode", 1,
                 "--served-model-name", "demo") as running:  # fmt: skip
        yield running


@pytest.fixture
def routers(cluster: Cluster) -> Iterator[list[tuple[int, OpenAI]]]:
    """Process and client of each; a connection that stays belongs to one router."""
    found: dict[int, OpenAI] = {}
    opened: list[OpenAI] = []
    deadline = time.monotonic() + 30
    while len(found) < 2:
        assert time.monotonic() < deadline
        web = httpx.Client(timeout=60)
        pid = int(web.get(f"{cluster.url}/health").headers[HEADER])
        opened.append(
            OpenAI(base_url=f"{cluster.url}/v1", api_key="x", max_retries=0, http_client=web)
        )
        found.setdefault(pid, opened[-1])
    yield list(found.items())
    for client in opened:
        client.close()


class Part(BaseModel):
    kind: Literal["prefill", "decode"]
    count: int = Field(ge=1, le=9)


TOOL: Any = {
    "type": "function",
    "name": "scale",
    "strict": True,
    "parameters": {**Part.model_json_schema(), "additionalProperties": False},
}


def test_calls_formats_and_turns(cluster: Cluster, routers: list[tuple[int, OpenAI]]) -> None:
    (_, one), (_, other) = routers
    parsed = one.responses.parse(
        **GREEDY, input="Which worker?", text_format=Part, max_output_tokens=200
    )
    assert parsed.output_parsed is not None and 1 <= parsed.output_parsed.count <= 9
    options: Any = {**GREEDY, "tools": [TOOL], "max_output_tokens": 200}
    forced: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    called = one.responses.create(**options, **forced, input="Scale the decode workers.")
    (call,) = called.output
    assert call.type == "function_call" and call.name == "scale"
    Part.model_validate_json(call.arguments)
    with other.responses.stream(**options, **forced, input="Scale the decode workers.") as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    after = other.responses.create(
        **GREEDY, previous_response_id=called.id, input=result, max_output_tokens=20
    )
    pasted: Any = [
        {"role": "user", "content": "Scale the decode workers."},
        *(item.to_dict() for item in called.output),
        *result,
    ]
    by_hand = one.responses.create(**GREEDY, input=pasted, max_output_tokens=20)
    assert after.output_text == by_hand.output_text
    assert after.usage and by_hand.usage
    assert after.usage.input_tokens == by_hand.usage.input_tokens
    read = one.responses.retrieve(after.id)
    assert read.output_text == after.output_text
    assert json.loads(read.to_json()) == json.loads(after.to_json())
    cluster.wait_until_clean()


def test_a_response_whose_router_dies_has_failed(
    cluster: Cluster, routers: list[tuple[int, OpenAI]]
) -> None:
    (victim, one), (_, other) = routers
    long: Any = {**GREEDY, "extra_body": {"ignore_eos": True}, "max_output_tokens": 900}
    lost = one.responses.create(**long, input="Once", background=True)
    kept = other.responses.create(**long, input="Once", background=True)
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (found := other.responses.retrieve(lost.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.status == "failed" and found.error and found.error.code == "server_error"
    while (found := other.responses.retrieve(kept.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.status == "incomplete" and found.usage and found.usage.output_tokens == 900
    cluster.wait_until_clean()
