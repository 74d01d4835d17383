"""/v1/responses through the official client, and event by event."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from response_events import events
from router_harness import TEXT, RouterHarness

from pdserve.cluster.records import Role
from pdserve.protocol.errors import ErrorCode, WorkerError

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "demo", "input": "Hi"}
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "strict": False,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

Start = Callable[..., RouterHarness]


def prompt_of(harness: RouterHarness) -> str:
    """What the first worker was last asked to read."""
    ids = harness.workers[0].submits[-1].prompt_token_ids
    return harness.router.model.tokenizer.core.decode(ids, skip_special_tokens=False)


def refused(harness: RouterHarness, status: int = 400, **change: Any) -> dict[str, Any]:
    answer = harness.client.post(PATH, json={**BODY, **change})
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.fixture
def speaker(start: Start) -> Callable[[str], OpenAI]:
    """A client of a router whose model says this, and may call tools."""
    harness = start(enable_auto_tool_choice=True)
    harness.add(Role.COLOCATED)
    harness.until_connected()

    def client(text: str) -> OpenAI:
        harness.workers[0].script = harness.answer(text)
        return OpenAI(base_url=f"{harness.url}/v1", api_key="x", max_retries=0, timeout=10)

    return client


MEMBERS = {
    "id", "created_at", "incomplete_details", "instructions", "metadata", "model", "object",
    "output", "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p", "background",
    "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt", "reasoning",
    "service_tier", "status", "text", "top_logprobs", "truncation", "usage", "user",
    "presence_penalty", "frequency_penalty", "kv_transfer_params", "ec_transfer_params",
    "input_messages", "output_messages", "error",
}  # fmt: skip


def test_a_plain_answer(client: OpenAI, harness: RouterHarness) -> None:
    answer = client.responses.create(**BODY, instructions="Be brief.", metadata={"a": "b"},
                                     temperature=0.5, user="me")  # fmt: skip
    assert answer.output_text == TEXT and answer.status == "completed"
    assert answer.id.startswith("resp_") and answer.error is None
    assert (answer.instructions, answer.metadata) == ("Be brief.", {"a": "b"})
    assert (answer.temperature, answer.top_p, answer.user) == (0.5, 1.0, "me")
    assert answer.tool_choice == "none" and answer.tools == [] and answer.parallel_tool_calls
    asked = len(harness.workers[0].submits[-1].prompt_token_ids)
    assert "Be brief." in prompt_of(harness)
    usage = answer.usage
    assert usage and usage.input_tokens == asked and usage.input_tokens_details.cached_tokens == 3
    assert usage.total_tokens == asked + usage.output_tokens
    whole = harness.client.post(PATH, json=BODY).json()
    assert set(whole) == MEMBERS
    (item,) = whole["output"]
    assert item.pop("id").startswith("msg_")
    part = {"annotations": [], "text": TEXT, "type": "output_text", "logprobs": None}
    assert item == {"content": [part], "role": "assistant", "status": "completed",
                    "type": "message", "phase": None}  # fmt: skip


def test_the_sequence_of_events(harness: RouterHarness) -> None:
    answer = harness.client.post(PATH, json={**BODY, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(answer.text)
    names = [name.removeprefix("response.") for name, _ in found]
    deltas = names.count("output_text.delta")
    assert found[0][1]["sequence_number"] == 0
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    begun, item, part = found[0][1]["response"], found[2][1]["item"], found[3][1]
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert item["status"] == "in_progress" and item["content"] == []
    assert part["part"]["text"] == "" and part["item_id"] == item["id"]
    assert all(data["output_index"] == 0 for _, data in found[2:-1])
    pieces = [data["delta"] for name, data in found if name == "response.output_text.delta"]
    assert "".join(pieces) == TEXT == found[-4][1]["text"] == found[-3][1]["part"]["text"]
    final = found[-1][1]["response"]
    assert final["output"] == [found[-2][1]["item"]] and final["id"] == begun["id"]
    assert final["output"][0]["content"][0]["text"] == TEXT
    whole = harness.client.post(PATH, json=BODY).json()
    for body in (whole, final):
        for name in ("id", "created_at"):
            del body[name]
        del body["output"][0]["id"]
    assert whole == final


def test_the_stream_helper(client: OpenAI) -> None:
    with client.responses.stream(**BODY, max_output_tokens=1) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.status == "incomplete" and final.incomplete_details
    assert final.incomplete_details.reason == "max_output_tokens"
    assert final.output[0].status == "completed"  # type: ignore[union-attr]
    assert TEXT.startswith(final.output_text) and final.max_output_tokens == 1


class Answer(BaseModel):
    city: str


def test_a_text_format(speaker: Callable[[str], OpenAI]) -> None:
    with speaker('{"city": "Paris"}') as client:
        answer = client.responses.parse(**BODY, text_format=Answer)
        assert answer.output_parsed == Answer(city="Paris")
        assert answer.text and answer.text.format and answer.text.format.type == "json_schema"
        with client.responses.stream(**BODY, text_format=Answer) as stream:
            assert stream.get_final_response().output_parsed == Answer(city="Paris")


def test_the_format_reaches_the_workers(harness: RouterHarness) -> None:
    schema = {"type": "json_schema", "name": "n", "schema": TOOL["parameters"]}
    for body, there in (
        ({"text": {"format": schema}}, True),
        ({"text": {"format": {"type": "json_object"}, "verbosity": "low"}}, True),
        ({"text": {"format": {"type": "text"}}}, False),
        ({"structured_outputs": {"regex": "x+"}}, True),
    ):
        answer = harness.client.post(PATH, json={**BODY, **body})
        assert answer.status_code == 200, answer.text
        constraint = harness.workers[0].submits[-1].sampling.constraint
        assert (constraint is not None) == there


def test_a_call_and_its_output(speaker: Callable[[str], OpenAI]) -> None:
    with speaker(f"Well. {CALL}") as client:
        answer = client.responses.create(**BODY, tools=[TOOL])
        message, call = answer.output
        assert message.type == "message" and answer.output_text == "Well. "
        assert call.type == "function_call" and call.name == "get_weather"
        assert json.loads(call.arguments) == {"city": "Paris"} and call.id and call.id[:3] == "fc_"
        assert answer.status == "completed" and answer.tool_choice == "auto"
        with client.responses.stream(**BODY, tools=[TOOL]) as stream:
            kinds = [event.type.removeprefix("response.") for event in stream]
            streamed = stream.get_final_response().output
        begun = kinds.index("output_item.added", kinds.index("output_item.done"))
        assert list(dict.fromkeys(kinds[begun:])) == [
            "output_item.added", "function_call_arguments.delta",
            "function_call_arguments.done", "output_item.done", "completed"]  # fmt: skip
        assert streamed[-1].type == "function_call" and streamed[-1].arguments == call.arguments
        assert [item.type for item in streamed] == ["message", "function_call"]
    with speaker("It is sunny.") as client:
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        pasted = [item.model_dump() for item in answer.output]
        items: Any = [{"role": "user", "content": "Hi"}, *pasted, result]
        after = client.responses.create(model="demo", input=items, tools=[TOOL])
        assert after.output_text == "It is sunny."


def test_calls_are_text_where_nobody_may_decide_to_call(harness: RouterHarness) -> None:
    answer = harness.client.post(PATH, json={**BODY, "tools": [TOOL]}).json()
    assert answer["output"][0]["content"][0]["text"] == TEXT and answer["tool_choice"] == "auto"
    (tool,) = answer["tools"]
    assert tool["name"] == "get_weather" and {"description", "defer_loading"} < set(tool)
    some: Any = {"type": "allowed_tools", "tools": [{"type": "function", "name": "get_weather"}]}
    for choice in ("required", {**some, "mode": "required"}):
        forced = {"tools": [TOOL], "tool_choice": choice}
        answer = harness.client.post(PATH, json={**BODY, **forced}).json()
        assert answer["tool_choice"] == choice
        assert harness.workers[0].submits[-1].sampling.constraint is not None
    free = {"tools": [TOOL], "tool_choice": {**some, "mode": "auto"}}
    assert harness.client.post(PATH, json={**BODY, **free}).status_code == 200
    assert harness.workers[0].submits[-1].sampling.constraint is None


def test_items_become_turns(start: Start) -> None:
    harness = start(chat_template="{% for m in messages %}[{{ m.role }}|{{ m.reasoning }}|"
                    "{{ m.content }}|{% for c in m.tool_calls or [] %}{{ c.function.name }}"
                    "{% endfor %}]{% endfor %}{{ add_generation_prompt }}")  # fmt: skip
    harness.add(Role.COLOCATED)
    harness.until_connected()
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "U"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "R"}]},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "A", "annotations": [], "logprobs": None}],
         "id": "msg_1", "status": "completed", "phase": None},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": None},
        {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "one"},
        {"type": "function_call_output", "call_id": "d", "output": [
            {"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"},
        {"role": "user", "content": "V"},
    ]  # fmt: skip
    answer = harness.client.post(PATH, json={"input": items, "instructions": "I"})
    assert answer.status_code == 200, answer.text
    assert prompt_of(harness) == (
        "[system||I|][system||D|][user||U|][assistant|R|A|fg][tool||one|][tool||two|]"
        "[assistant||x|][assistant||y|][user||V|]True"
    )
    items.append(
        {"type": "message", "role": "assistant", "content": "Half", "status": "incomplete"}
    )
    harness.client.post(PATH, json={"input": items})
    assert "[user||V|][assistant||Half" in prompt_of(harness)
    assert not prompt_of(harness).endswith("True")
    earlier = [{"role": "user", "content": "before"}]
    harness.client.post(PATH, json={"input": "now", "previous_input_messages": earlier})
    assert prompt_of(harness) == "[user||before|][user||now|]True"


def test_log_probabilities(client: OpenAI, harness: RouterHarness) -> None:
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = client.responses.create(**BODY, **options)
    part = answer.output[0].content[0]  # type: ignore[union-attr,index]
    assert part.type == "output_text" and part.logprobs and answer.top_logprobs == 2
    assert len(part.logprobs) == (answer.usage and answer.usage.output_tokens)
    assert all(len(entry.top_logprobs) >= 2 for entry in part.logprobs)
    with client.responses.stream(**BODY, **options) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response().output[0].content[0]  # type: ignore[union-attr,index]
    assert final.type == "output_text" and final.logprobs
    assert [e.token for e in final.logprobs] == [e.token for e in part.logprobs]
    told = [entry.token for event in deltas for entry in event.logprobs]
    assert told == [e.token for e in final.logprobs][: len(told)] and told
    plain = client.responses.create(**BODY, top_logprobs=2)
    assert plain.output[0].content[0].logprobs is None  # type: ignore[union-attr,index]


def test_rendered_messages(harness: RouterHarness) -> None:
    body = {**BODY, "enable_response_messages": True}
    whole = harness.client.post(PATH, json=body).json()
    (given,), (made,) = whole["input_messages"], whole["output_messages"]
    assert given["tokens"] == list(harness.workers[0].submits[-1].prompt_token_ids)
    assert len(made["tokens"]) == whole["usage"]["output_tokens"]
    assert made["message"].startswith(TEXT)
    streamed = events(harness.client.post(PATH, json={**body, "stream": True}).text)
    assert streamed[-1][1]["response"]["output_messages"] == [made]


def test_sampling_and_limits(client: OpenAI, harness: RouterHarness) -> None:
    options = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "presence_penalty": 0.5,
               "frequency_penalty": 0.25, "repetition_penalty": 1.5, "seed": 5}  # fmt: skip
    client.responses.create(**BODY, extra_body={**options, "max_output_tokens": 90})
    sampling = harness.workers[0].submits[-1].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert sampling.max_tokens == 90
    answer = client.responses.create(**BODY, extra_body={"stop": ["a decode wor"]})
    assert answer.output_text == TEXT[: TEXT.index("a decode wor")]
    named = client.responses.create(**BODY, extra_body={"request_id": "mine_1", "store": False})
    assert named.id == "mine_1"


def test_truncation(client: OpenAI, harness: RouterHarness) -> None:
    text = "much " * harness.router.model.max_len
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="demo", input=text)
    assert client.responses.create(model="demo", input=text, truncation="auto",
                                   max_output_tokens=5).status == "incomplete"  # fmt: skip
    asked = len(harness.workers[0].submits[-1].prompt_token_ids)
    assert asked == harness.router.model.max_len - 5


def test_counting(client: OpenAI, harness: RouterHarness) -> None:
    submits = len(harness.workers[0].submits)
    counted = client.responses.input_tokens.count(model="demo", input="Hi", instructions="Brief.")
    assert counted.object == "response.input_tokens"
    assert len(harness.workers[0].submits) == submits
    answer = client.responses.create(**BODY, instructions="Brief.")
    assert answer.usage and answer.usage.input_tokens == counted.input_tokens


def item(**members: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "Hi"}, members]}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "'required' must be specified with 'tools'"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'function' must"),
        ({"tools": [TOOL], "tool_choice": "often"}, "tool_choice", "often"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "mcp"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools' must"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [3]}},
         "tool_choice", "mode"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "f"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "web_search"),
        ({"prompt": {"id": "x"}}, "prompt", "prompt template is not supported"),
        ({"background": True, "store": False}, "background", "`store` is true"),
        ({"input": []}, "input", "empty conversation"),
        ({"input": None}, "body.input", "valid"), ({"include": ["x"]}, "body.include.0", "include"),
        (item(role="user", content=[{"type": "input_file"}]), "input.1.content.0",
         "Unsupported chat content part type: 'input_file'"),
        (item(role="user", content=[{"type": "input_image", "image_url": "x"}]),
         "input.1.content.0", "text only"),
        (item(role="nobody", content=""), "input.1.role", "nobody"),
        (item(role="user"), "input.1.content", "string"),
        (item(type="mcp_call"), "input.1", "mcp_call"), (item(type=[5]), "input.1", "[5]"),
        (item(type="function_call", call_id="c", name="f"), "input.1.arguments", "string"),
        (item(type="function_call_output", output="x"), "input.1.call_id", "string"),
        (item(type="reasoning", content="x"), "input.1.content", "list"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "xml"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "sche"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "x"}},
         "structured_outputs", "text.format"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "body.max_output_tokens", "greater"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 99}, "top_logprobs", "99"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"temperature": 3}, "temperature", "temperature"),
        ({"metadata": {"a": 1}}, "body.metadata", "string"),
        ({"request_id": "a/b"}, "body.request_id", "pattern"),
        ({"kv_transfer_params": {}}, "kv_transfer_params", "kv_transfer_params"),
        ({"previous_response_id": "x", "previous_input_messages": []}, "previous_input_messages",
         "together"),
    ],
)  # fmt: skip
def test_faults_name_their_field(
    harness: RouterHarness, change: dict[str, Any], param: str, words: str
) -> None:
    error = refused(harness, **change)
    assert error["param"] == param, error
    assert words in error["message"]


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.responses.create(model="nope", input="Hi")


# routers of their own


def test_a_stream_that_fails_on_its_way(start: Start) -> None:
    harness = start()
    harness.add(Role.PREFILL)
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    decode.refuse = [WorkerError(code=ErrorCode.INTERNAL, message="The step failed.")]
    found = events(harness.client.post(PATH, json={**BODY, "stream": True}).text)
    name, data = found[-1]
    del data["sequence_number"]
    assert name == "error"
    assert data == {"code": "server_error", "message": "The step failed.", "param": None}
