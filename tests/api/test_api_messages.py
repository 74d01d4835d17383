"""/v1/messages through the official client, and frame by frame."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from fake_worker import FakeWorker
from router_harness import TEXT, RouterHarness

from pdserve.cluster.records import Role
from pdserve.protocol.errors import ErrorCode, WorkerError
from pdserve.router.messages_writer import MessagesWriter

PATH = "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 200, "messages": HI}

Start = Callable[..., RouterHarness]


@pytest.fixture(scope="module")
def claude(harness: RouterHarness) -> Iterator[Anthropic]:
    with Anthropic(base_url=harness.url, api_key="none", max_retries=0, timeout=10) as client:
        yield client


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: name and data, which name the same type."""
    found = []
    for frame in text.strip("\n").split("\n\n"):
        name, data = frame.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        found.append((content.pop("type"), content))
    return found


def prompt_of(harness: RouterHarness) -> str:
    """What the first worker was last asked to read."""
    ids = harness.workers[0].submits[-1].prompt_token_ids
    return harness.router.model.tokenizer.core.decode(ids, skip_special_tokens=False)


def error_of(answer: Any, status: int, kind: str) -> str:
    """The message of an error in Anthropic's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    message: str = body["error"]["message"]
    return message


def test_a_plain_answer(claude: Anthropic, harness: RouterHarness) -> None:
    answer = claude.messages.create(**BODY)
    (block,) = answer.content
    assert block.type == "text" and block.text == TEXT
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "demo")
    assert answer._request_id
    usage = answer.usage
    asked = len(harness.workers[0].submits[-1].prompt_token_ids)
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens + 3 + (usage.cache_creation_input_tokens or 0) == asked
    counted = claude.messages.count_tokens(model="demo", messages=HI)
    assert counted.input_tokens == asked
    chat = harness.client.post("/v1/chat/completions", json={"messages": HI}).json()
    assert chat["usage"]["prompt_tokens"] == asked
    assert chat["usage"]["completion_tokens"] == usage.output_tokens


def test_the_sequence_of_events(harness: RouterHarness) -> None:
    answer = harness.client.post(PATH, json={**BODY, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\n") and "[DONE]" not in answer.text
    found = events(answer.text)
    names = [name for name, _ in found]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    asked = len(harness.workers[0].submits[-1].prompt_token_ids)
    message = found[0][1]["message"]
    assert message.pop("id").startswith("chatcmpl-")
    assert message == {
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "demo",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": asked, "output_tokens": 0},
    }
    assert found[2][1] == {"index": 0, "content_block": {"type": "text", "text": ""}}
    pieces = [data for name, data in found if name == "content_block_delta"]
    assert all(p["index"] == 0 and p["delta"]["type"] == "text_delta" for p in pieces)
    assert "".join(piece["delta"]["text"] for piece in pieces) == TEXT
    whole = harness.client.post(PATH, json=BODY).json()
    assert found[-2][1] == {
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": whole["usage"],
    }


def test_the_stream_helper(claude: Anthropic) -> None:
    with claude.messages.stream(**BODY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == TEXT == final.content[0].text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == claude.messages.create(**BODY).usage.output_tokens


def test_the_async_client_many_at_once(harness: RouterHarness) -> None:
    async def ask() -> list[str]:
        async with AsyncAnthropic(base_url=harness.url, api_key="x") as client:

            async def one() -> str:
                async with client.messages.stream(**BODY) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*(one() for _ in range(10)))

    assert asyncio.run(ask()) == [TEXT] * 10


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(harness: RouterHarness, stream: bool) -> None:
    body = {**BODY, "stop_sequences": ["zz", "a decode wor"], "stream": stream}
    answer = harness.client.post(PATH, json=body)
    if stream:
        found = events(answer.text)
        text = "".join(d["delta"]["text"] for n, d in found if n == "content_block_delta")
        stop = found[-2][1]["delta"]
    else:
        text = answer.json()["content"][0]["text"]
        stop = {name: answer.json()[name] for name in ("stop_reason", "stop_sequence")}
    assert text == TEXT[: TEXT.index("a decode wor")]
    assert stop == {"stop_reason": "stop_sequence", "stop_sequence": "a decode wor"}


def test_a_stop_before_any_text(harness: RouterHarness) -> None:
    body = {**BODY, "stop_sequences": ["H"], "stream": True}
    names = [name for name, _ in events(harness.client.post(PATH, json=body).text)]
    assert names == ["message_start", "ping", "content_block_start", "content_block_stop",
                     "message_delta", "message_stop"]  # fmt: skip
    del body["stream"]
    assert harness.client.post(PATH, json=body).json()["content"] == [{"type": "text", "text": ""}]


def test_limits_and_sampling(claude: Anthropic, harness: RouterHarness) -> None:
    answer = claude.messages.create(**{**BODY, "max_tokens": 1})
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 1
    options = {"temperature": 0.5, "top_p": 0.25, "top_k": 7}
    claude.messages.create(**BODY, extra_body=options)
    sampling = harness.workers[0].submits[-1].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert sampling.max_tokens == 200


def test_system_in_all_its_places(claude: Anthropic, harness: RouterHarness) -> None:
    claude.messages.create(**BODY, system="Be brief. Be kind.")
    expected = prompt_of(harness)
    assert "<|im_start|>system\nBe brief. Be kind.<|im_end|>" in expected
    bill = {"type": "text", "text": "x-anthropic-billing-header: 1"}
    blocks: list[Any] = [bill, {"type": "text", "text": "Be brief. "},
                         {"type": "text", "text": "Be kind."}]  # fmt: skip
    claude.messages.create(**BODY, system=blocks)
    assert prompt_of(harness) == expected
    messages = [*HI, {"role": "system", "content": "Be brief. Be kind."}]
    answer = harness.client.post(PATH, json={**BODY, "messages": messages})
    assert answer.status_code == 200 and prompt_of(harness) == expected


def test_blocks_of_earlier_turns(harness: RouterHarness) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What", "cache_control": {}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1",
                 "content": [{"type": "text", "text": "seven"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]  # fmt: skip
    assert harness.client.post(PATH, json={**BODY, "messages": messages}).status_code == 200
    prompt = prompt_of(harness)
    places = [prompt.index(part) for part in ("What", "Let me see.", "seven", "And?")]
    assert places == sorted(places) and "Error" not in prompt
    result = messages[-1]["content"][0]  # type: ignore[index]
    for text, failed, shown in (
        ("no such place", True, "Error: no such place"),
        ("ERROR 7", True, "ERROR 7"),
        ("fine", False, "fine"),
    ):
        result |= {"content": text, "is_error": failed}  # type: ignore[operator]
        assert harness.client.post(PATH, json={**BODY, "messages": messages}).status_code == 200
        prompt = prompt_of(harness)
        assert shown in prompt and prompt.count("Error: ") == shown.count("Error: ")
    reference = {"type": "tool_reference", "tool_name": "look"}
    result |= {"content": [reference], "is_error": True}  # type: ignore[operator]
    answer = harness.client.post(PATH, json={**BODY, "messages": messages})
    # It has reached the template, which knows no such parts.
    assert answer.status_code == 400 and "not tool_reference" in answer.text
    result |= {"content": [{"type": "text", "text": "gone"}]}  # type: ignore[operator]
    assert harness.client.post(PATH, json={**BODY, "messages": messages}).status_code == 200
    assert "Error: gone" in prompt_of(harness)
    result |= {"is_error": "yes"}  # type: ignore[operator]
    answer = harness.client.post(PATH, json={**BODY, "messages": messages})
    assert answer.status_code == 400 and "messages.2.content.0.is_error" in answer.text


def test_an_answer_that_the_client_began(harness: RouterHarness) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well, "}]
    answer = harness.client.post(PATH, json={**BODY, "messages": messages})
    assert answer.json()["content"][0]["text"] == TEXT
    assert prompt_of(harness).endswith("Well, ")


def test_what_is_accepted_and_changes_nothing(harness: RouterHarness) -> None:
    plain = harness.client.post(PATH, json=BODY)
    expected = prompt_of(harness)
    more = {"metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"}, "service_tier": "auto",
            "cache_control": {"type": "ephemeral"}, "tools": [], "unknown": 1,
            "output_config": {"effort": "low"}}  # fmt: skip
    answer = harness.client.post(PATH, json={**BODY, **more})
    assert answer.json()["content"] == plain.json()["content"]
    assert prompt_of(harness) == expected
    nulls = dict.fromkeys(["system", "stop_sequences", "stream", "tools", "thinking", "top_k"])
    assert harness.client.post(PATH, json={**BODY, **nulls}).status_code == 200


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
TOOL = {"name": "look", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": None}, "body.model"), ({"model": ""}, "body.model"),
        ({"max_tokens": None}, "body.max_tokens"), ({"max_tokens": 0}, "body.max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content.0.text"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages.0.content.0"),
        ({"system": [IMAGE]}, "system.0"), ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"), ({"tools": [TOOL]}, "tools"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "tools.0"),
        ({"tools": [{"name": "s"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "what"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}, "thinking"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"output_config": {"effort": "huge"}}, "effort"), ({"temperature": 3}, "temperature"),
        ({"mcp_servers": [{}]}, "mcp_servers"), ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"), ({"cache_salt": ""}, "cache_salt"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(harness: RouterHarness, change: dict[str, Any], named: str) -> None:
    for path in (PATH, f"{PATH}?beta=true"):
        answer = harness.client.post(path, json={**BODY, **change})
        assert named in error_of(answer, 400, "invalid_request_error")


def test_tools_that_must_not_be_called(harness: RouterHarness) -> None:
    answer = harness.client.post(
        PATH, json={**BODY, "tools": [TOOL], "tool_choice": {"type": "none"}}
    )
    assert answer.status_code == 200, answer.text


def test_thinking_is_switched_off_for_the_template(start: Start) -> None:
    harness = start(chat_template="{{ enable_thinking }} {{ reasoning_effort }}")
    harness.add(Role.COLOCATED)
    harness.until_connected()
    more = {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}
    assert harness.client.post(PATH, json={**BODY, **more}).status_code == 200
    assert prompt_of(harness) == "False none"
    del more["thinking"]
    harness.client.post(PATH, json={**BODY, **more})
    assert prompt_of(harness) == "True high"


def test_errors_of_every_kind(claude: Anthropic, harness: RouterHarness) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**{**BODY, "model": "nope"})
    assert "nope" in str(caught.value) and caught.value.request_id
    for text in ("{bad", "[]", '{"a":' * 5000):
        headers = {"content-type": "application/json"}
        answer = harness.client.post(PATH, content=text, headers=headers)
        error_of(answer, 400, "invalid_request_error")
    error_of(harness.client.get(PATH), 405, "invalid_request_error")
    error_of(harness.client.post(f"{PATH}/nothing", json={}), 404, "not_found_error")
    assert "error" in harness.client.post("/v1/messagesnot", json={}).json()


def test_counting(claude: Anthropic, harness: RouterHarness) -> None:
    submits = len(harness.workers[0].submits)
    plain = claude.messages.count_tokens(model="demo", messages=HI, system="Be brief.")
    longer = claude.messages.count_tokens(model="demo", messages=[*HI, *HI], system="Be brief.")
    assert longer.input_tokens > plain.input_tokens
    body = {"model": "demo", "messages": HI}
    answer = harness.client.post(f"{PATH}/count_tokens", json=body).json()
    count = answer["input_tokens"]
    assert answer["context_management"] == {"original_input_tokens": count}
    error_of(
        harness.client.post(f"{PATH}/count_tokens", json={**body, "messages": []}),
        400,
        "invalid_request_error",
    )
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.count_tokens(model="nope", messages=HI)
    thinking = {"type": "enabled", "budget_tokens": 5000}
    answer = harness.client.post(f"{PATH}/count_tokens", json={**body, "thinking": thinking})
    assert answer.json()["input_tokens"] == count
    assert len(harness.workers[0].submits) == submits


# routers of their own


def test_both_key_headers(start: Start) -> None:
    harness = start(api_key=("first",))
    harness.add(Role.COLOCATED)
    harness.until_connected()
    for headers in ({"x-api-key": "first"}, {"authorization": "Bearer first"}):
        assert harness.client.post(PATH, json=BODY, headers=headers).status_code == 200
        assert harness.client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
        error_of(harness.client.post(PATH, json=BODY, headers=headers), 401, "authentication_error")
    other = harness.client.post(
        "/v1/chat/completions", json={"messages": HI}, headers={"x-api-key": "first"}
    )
    assert other.status_code == 401


def test_no_workers_is_overloaded(start: Start) -> None:
    harness = start()
    answer = harness.client.post(PATH, json=BODY)
    error_of(answer, 529, "overloaded_error")
    assert answer.headers["retry-after"] == "1"


def test_a_stream_that_fails_on_its_way(start: Start) -> None:
    harness = start()
    harness.add(Role.PREFILL)
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    decode.refuse = [WorkerError(code=ErrorCode.INTERNAL, message="The step failed.")]
    with Anthropic(base_url=harness.url, api_key="x", max_retries=0) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            with client.messages.stream(**BODY) as stream:
                stream.get_final_message()
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "api_error", "message": "The step failed."},
    }


async def go_on(worker: FakeWorker) -> None:
    worker.go.set()


def test_silence_is_broken_by_pings(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MessagesWriter, "silence_s", 0.02)
    harness = start()
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    worker.pause_at = 3
    seen = []
    with harness.client.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
        for line in answer.iter_lines():
            seen.append(line)
            if seen.count("event: ping") == 4:
                harness.run(go_on(worker))
    found = events("\n".join(seen))
    names = [name for name, _ in found]
    assert names.count("ping") >= 4 and names[-1] == "message_stop"
    text = "".join(d["delta"]["text"] for n, d in found if n == "content_block_delta")
    assert text == TEXT
