"""Tokens in and out, rendering, aborts, and SageMaker's way in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from router_harness import TEXT, RouterHarness

from pdserve.cluster.records import Role

HI: list[Any] = [{"role": "user", "content": "Hi"}]
GENERATE = "/inference/v1/generate"
ABORT = "/inference/v1/abort_requests"
RENDERS = ["/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render"]


@pytest.fixture(scope="module", params=["pair", "colocated"])
def scaled(request: pytest.FixtureRequest, redis_url: str) -> Iterator[RouterHarness]:
    with RouterHarness(redis_url, enable_scale_out=True) as running:
        roles = [Role.PREFILL, Role.DECODE] if request.param == "pair" else [Role.COLOCATED]
        for role in roles:
            running.add(role)
        running.until_connected()
        yield running
        running.until_idle()


def post(harness: RouterHarness, path: str, **body: Any) -> Any:
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(text: str) -> list[dict[str, Any]]:
    frames = text.removesuffix("\n\n").split("\n\n")
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_the_same_tokens_as_a_completion(scaled: RouterHarness) -> None:
    tokens = post(scaled, "/tokenize", prompt="One two")["tokens"]
    plain = post(scaled, "/v1/completions", prompt="One two", max_tokens=9, return_token_ids=True)
    params = {"max_tokens": 9, "temperature": 0}
    answer = post(scaled, GENERATE, token_ids=tokens, sampling_params=params, return_token_ids=True)
    assert answer["request_id"].startswith("generate-tokens-")
    assert answer["prompt_token_ids"] == tokens and answer["usage"] == plain["usage"]
    (choice,) = answer["choices"]
    assert choice["token_ids"] == plain["choices"][0]["token_ids"]
    assert choice["finish_reason"] == "length" and "text" not in choice
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 9}]


def test_text_and_whole_answers(scaled: RouterHarness) -> None:
    answer = post(scaled, GENERATE, token_ids=[1, 2], sampling_params={}, output_mode="text")
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "stop"
    assert choice["token_ids"][-1] in scaled.router.model.eos_token_ids
    told = scaled.workers[0].submits[-1].sampling
    assert told.max_tokens == scaled.router.model.max_len - 2
    stopped = post(
        scaled, GENERATE, token_ids=[1], sampling_params={"stop": ["wor"]}, output_mode="text"
    )
    assert stopped["choices"][0]["text"] == TEXT[: TEXT.index("wor")]
    assert stopped["choices"][0]["stop_reason"] == "wor"


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_the_stream_says_the_same(scaled: RouterHarness, mode: str) -> None:
    body = {
        "token_ids": [5],
        "sampling_params": {"logprobs": 2, "n": 2, "temperature": 1, "seed": 3},
        "output_mode": mode,
    }
    whole = post(scaled, GENERATE, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = chunks(scaled.client.post(GENERATE, json={**body, **options}).text)
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in found[:-1])
    for index, choice in enumerate(whole["choices"]):
        parts = [c for chunk in found for c in chunk["choices"] if c["index"] == index]
        assert [t for part in parts for t in part["token_ids"]] == choice["token_ids"]
        scores = [score for part in parts for score in part["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
        assert "".join(part.get("text", "") for part in parts) == choice.get("text", "")
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert [part["weight_versions"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["weight_versions"] == choice["weight_versions"]
        if mode == "tokens":
            for token_id, score in zip(choice["token_ids"], scores, strict=True):
                assert score["token_id"] == score["top_logprobs"][0]["token_id"] == token_id


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"token_ids": []}, "token_ids"), ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [10**6]}, "token_ids"), ({"token_ids": None}, "token_ids"),
        ({"sampling_params": None}, "sampling_params"), ({"output_mode": "x"}, "output_mode"),
        ({"reasoning_parser_kwargs": {"zz": 1}}, "reasoning_parser_kwargs"),
        ({"sampling_params": {"n": 5000, "temperature": 1}}, "n"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"temperature": 9}}, "temperature"),
        ({"sampling_params": {"detokenize": False}, "output_mode": "text"}, "detokenize"),
        ({"sampling_params": {"detokenize": False, "stop": "x"}}, "detokenize"),
        ({"sampling_params": {"extra_args": {"a": 1}}}, "extra_args"),
        ({"sampling_params": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"features": {}}, "features"), ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"token_ids": [1] * 5000}, "input_tokens"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(scaled: RouterHarness, change: dict[str, Any], param: str) -> None:
    body = {"token_ids": [1], "sampling_params": {}} | change
    answer = scaled.client.post(GENERATE, json=body)
    assert answer.status_code == 400, answer.text
    assert param in answer.json()["error"]["param"]


@pytest.mark.parametrize("stream", [False, True])
def test_aborting(scaled: RouterHarness, stream: bool) -> None:
    """A request that would go on for long ends at once, on every worker."""
    last = scaled.workers[-1]
    last.pause_at = 3
    found: list[Any] = []
    body = {
        "token_ids": [1],
        "sampling_params": {"ignore_eos": True},
        "request_id": "mine",
        "stream": stream,
    }
    caller = threading.Thread(
        target=lambda: found.append(scaled.client.post(GENERATE, json=body)), daemon=True
    )
    caller.start()
    scaled.wait(lambda: not last.go.is_set(), "for a pause")
    last.pause_at = None
    for ids in ([], ["unknown"], ["generate-tokens-mine"]):
        answer = scaled.client.post(ABORT, json={"request_ids": ids})
        assert answer.status_code == 200 and answer.content == b""
    caller.join(10)

    async def go_on() -> None:
        last.go.set()

    scaled.run(go_on())
    (answer,) = found
    choices = [c for k in chunks(answer.text) for c in k["choices"]] if stream else None
    choice = choices[-1] if choices else answer.json()["choices"][0]
    assert choice["finish_reason"] == "abort"
    scaled.until_idle()
    assert "generate-tokens-mine" in last.aborts[-1]


def test_aborting_needs_ids(scaled: RouterHarness) -> None:
    for body in ({}, [], {"request_ids": None}):
        answer = scaled.client.post(ABORT, json=body)
        assert answer.status_code == 400
        assert "Missing 'request_ids' in request body" in answer.json()["error"]["message"]
    assert scaled.client.post(ABORT, json={"request_ids": "x"}).status_code == 400


def test_rendered_chat_can_be_generated(scaled: RouterHarness) -> None:
    body = {"messages": HI, "temperature": 0, "stop": ["wor"], "model": "demo", "logprobs": True,
            "top_logprobs": 2, "logit_bias": {"7": -3}, "min_tokens": 2}  # fmt: skip
    direct = post(scaled, "/v1/chat/completions", **body)
    told = scaled.workers[0].submits[-1]
    request = post(scaled, RENDERS[0], **body, return_token_offsets=True)
    assert request["request_id"].startswith("chatcmpl-") and request["model"] == "demo"
    assert request["token_ids"] == post(scaled, "/tokenize", messages=HI)["tokens"]
    assert len(request["token_offsets"]) == len(request["token_ids"])
    assert "seed" not in request["sampling_params"]
    answer = post(scaled, GENERATE, **{**request, "output_mode": "text"})
    assert answer["request_id"] == "generate-tokens-" + request["request_id"]
    assert answer["choices"][0]["text"] == direct["choices"][0]["message"]["content"]
    again = scaled.workers[0].submits[-1]
    assert again.prompt_token_ids == told.prompt_token_ids
    assert type(again.sampling)(**{**_fields(again.sampling), "seed": 0}) == type(told.sampling)(
        **{**_fields(told.sampling), "seed": 0}
    )


def _fields(sampling: Any) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def test_rendered_completions_and_messages(scaled: RouterHarness) -> None:
    listed = post(scaled, RENDERS[1], prompt=["One", "Two words"], seed=4, request_id="r")
    assert [request["request_id"] for request in listed] == ["cmpl-r-0", "cmpl-r-1"]
    assert [request["sampling_params"]["max_tokens"] for request in listed] == [16, 16]
    assert [request["sampling_params"]["seed"] for request in listed] == [4, 4]
    for request, text in zip(listed, ("One", "Two words"), strict=True):
        assert request["token_ids"] == post(scaled, "/tokenize", prompt=text)["tokens"]
        assert request["token_offsets"] is None
    message = post(scaled, RENDERS[2], model="demo", max_tokens=5, messages=HI)
    assert message["token_ids"] == post(scaled, "/tokenize", messages=HI)["tokens"]
    assert message["sampling_params"]["max_tokens"] == 5


def test_rendering_checks_what_the_endpoint_checks(scaled: RouterHarness) -> None:
    for change in ({"use_beam_search": True}, {"temperature": 9}, {"messages": []}):
        answer = scaled.client.post(RENDERS[0], json={"messages": HI} | change)
        assert answer.status_code == 400, answer.text


def test_all_of_it_must_be_switched_on(harness: RouterHarness) -> None:
    for path in (GENERATE, ABORT, RENDERS[0], RENDERS[1]):
        answer = harness.client.post(path, json={})
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert error["type"] == "PermissionDeniedError" and "--enable-scale-out" in error["message"]
    answer = harness.client.post(RENDERS[2], json={})
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_invocations(harness: RouterHarness) -> None:
    path = "/invocations"
    chat = post(harness, path, messages=HI, model="whatever")
    assert chat["object"] == "chat.completion" and chat["model"] == "demo"
    assert chat["choices"][0]["message"]["content"] == TEXT
    text = post(harness, path, prompt="One", max_tokens=3)
    assert text["object"] == "text_completion" and text["usage"]["completion_tokens"] == 3
    stream = harness.client.post(path, json={"messages": HI, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    missing = harness.client.post(path, json={})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "prompt"
    headers = {"content-type": "application/json"}
    for content in (b"{bad", b"[]", b"7"):
        assert harness.client.post(path, content=content, headers=headers).status_code == 400
