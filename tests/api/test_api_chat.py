"""/v1/chat/completions through the official client."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from router_harness import TEXT, RouterHarness

HI: list[Any] = [{"role": "user", "content": "Hi"}]


def stream_text(chunks: Any, index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_a_plain_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=HI)
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-") and answer.model == "demo"
    usage = answer.usage
    assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == 3


def test_the_stream_says_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=HI)
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert stream_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finishes = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert finishes == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


def test_the_stream_ends_with_done(harness: RouterHarness) -> None:
    body = {"messages": HI, "stream": True}
    answer = harness.client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    terminal = json.loads(frames[-3].removeprefix("data: "))
    assert terminal["choices"][0]["finish_reason"] == "stop"
    assert terminal["system_fingerprint"]


def test_the_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=HI) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_the_async_client_many_at_once(harness: RouterHarness) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{harness.url}/v1", api_key="x") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="demo", messages=HI, stream=True
                )
                return stream_text([chunk async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(20)))

    assert asyncio.run(ask()) == [TEXT] * 20


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: OpenAI, harness: RouterHarness, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HI, n=3, temperature=1, seed=5, stream=stream
    )
    if stream:
        chunks = list(answer)
        assert [stream_text(chunks, index) for index in range(3)] == [TEXT] * 3
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert [c.index for c in choices if c.delta.role] == [0, 1, 2]
        assert sorted(c.index for c in choices if c.finish_reason) == [0, 1, 2]
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.message.content for choice in answer.choices] == [TEXT] * 3
        assert answer.usage.completion_tokens % 3 == 0
    last = harness.workers[-1].submits[-3:]
    assert len({submit.sampling.seed for submit in last}) == 3
    assert any(submit.sampling.seed == 5 for submit in last)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_cover_every_token(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "stream": stream}
    answer = client.chat.completions.create(model="demo", messages=HI, **options)
    if stream:
        chunks = list(answer)
        entries = [
            entry
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
    else:
        entries = answer.choices[0].logprobs.content
        assert len(entries) == answer.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == TEXT + "<|im_end|>"
    for place, entry in enumerate(entries, start=1):
        assert math.exp(entry.logprob) <= 1
        assert len(entry.top_logprobs) == (2 if place % 2 == 0 else 3)
        assert any(top.token == entry.token for top in entry.top_logprobs)


def test_stop_strings_over_tokens(client: OpenAI) -> None:
    for stop, expected in (("a decode wor", "a decode wor"), (["zz", "2 ☃"], "2 ☃")):
        whole = client.chat.completions.create(model="demo", messages=HI, stop=stop)
        choice = whole.choices[0]
        assert choice.message.content == TEXT[: TEXT.index(expected)]
        assert choice.finish_reason == "stop"
        assert choice.model_extra and choice.model_extra["stop_reason"] == expected
        chunks = list(
            client.chat.completions.create(model="demo", messages=HI, stop=stop, stream=True)
        )
        assert stream_text(chunks) == choice.message.content
        kept = client.chat.completions.create(
            model="demo", messages=HI, stop=stop, extra_body={"include_stop_str_in_output": True}
        )
        assert kept.choices[0].message.content == TEXT[: TEXT.index(expected)] + expected


def test_a_stop_in_the_first_token(client: OpenAI, harness: RouterHarness) -> None:
    answer = client.chat.completions.create(model="demo", messages=HI, stop="H")
    assert answer.choices[0].message.content == ""
    harness.until_idle()


def test_limits_on_length(client: OpenAI, harness: RouterHarness) -> None:
    answer = client.chat.completions.create(model="demo", messages=HI, max_completion_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 1
    longest = harness.router.model.max_len
    client.chat.completions.create(model="demo", messages=HI, max_tokens=longest)
    sampling = harness.workers[0].submits[-1].sampling
    assert sampling.max_tokens == longest - len(harness.workers[0].submits[-1].prompt_token_ids)
    with pytest.raises(openai.BadRequestError, match="cannot be greater than max_model_len"):
        client.chat.completions.create(model="demo", messages=HI, max_tokens=longest + 1)


def test_token_ids_and_prompt_text(client: OpenAI, harness: RouterHarness) -> None:
    extra = {"return_token_ids": True, "return_prompt_text": True}
    answer = client.chat.completions.create(model="demo", messages=HI, extra_body=extra)
    found = answer.model_dump()
    assert answer.usage
    assert len(found["prompt_token_ids"]) == answer.usage.prompt_tokens
    assert len(found["choices"][0]["token_ids"]) == answer.usage.completion_tokens
    assert found["prompt_text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=HI, stream=True, extra_body=extra | {"stream_interval": 7}
        )
    )
    assert chunks[0].model_extra == {
        "prompt_token_ids": found["prompt_token_ids"],
        "prompt_text": found["prompt_text"],
    }
    groups = [c.model_extra["token_ids"] for k in chunks[1:] for c in k.choices if c.model_extra]
    assert [token for group in groups for token in group] == found["choices"][0]["token_ids"]
    assert all(len(group) >= 7 for group in groups[1:-1])


def test_continuous_usage(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=HI, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts) and len(counts) == len(chunks) - 1


def test_continuing_a_message(client: OpenAI, harness: RouterHarness) -> None:
    messages: Any = [*HI, {"role": "assistant", "content": "Well, "}]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    answer = client.chat.completions.create(model="demo", messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == "Well, " + TEXT
    prompt = harness.workers[0].submits[-1].prompt_token_ids
    assert harness.router.model.tokenizer.core.decode(prompt).endswith("Well, ")
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        client.chat.completions.create(
            model="demo", messages=messages, extra_body={"continue_final_message": True}
        )


def test_roles_parts_and_tools_of_earlier_turns(client: OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    answer = client.chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == TEXT


def test_prompt_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HI, extra_body={"prompt_logprobs": 1}
    ).model_dump()
    found = answer["prompt_logprobs"]
    assert len(found) == answer["usage"]["prompt_tokens"]
    assert found[0] is None and all(len(entry) in (1, 2) for entry in found[1:])
    assert set(next(iter(found[1].values()))) == {"logprob", "rank", "decoded_token"}


def test_timings_for_those_who_measure(harness: RouterHarness) -> None:
    for stream in (False, True):
        answer = harness.client.post(
            "/v1/chat/completions",
            json={"messages": HI, "stream": stream},
            headers={"x-pdserve-timings": "1"},
        )
        body = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
        member = body["pdserve"]
        moments = member["router"]
        assert 0 < moments["tokenized"] <= moments["first_token"] <= moments["finished"]
        legs = member["choices"][0]["legs"]
        kinds = ["prefill", "decode"] if len(harness.workers) == 2 else ["full"]
        assert [leg["kind"] for leg in legs] == kinds
        assert [leg["worker"] for leg in legs] == [w.worker_id for w in harness.workers]
        assert all(leg["events"][0] == ["queued", 0.0] for leg in legs)
    plain = harness.client.post("/v1/chat/completions", json={"messages": HI})
    assert "pdserve" not in plain.json()


def test_nulls_are_accepted_everywhere(harness: RouterHarness) -> None:
    from pdserve.router.schemas import ChatCompletionRequest

    body = dict.fromkeys(ChatCompletionRequest.model_fields) | {"messages": HI}
    answer = harness.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
