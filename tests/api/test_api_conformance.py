"""Probes of the whole API on real clusters: one prefill and one decode worker, and one colocated
worker, whose bodies must be the same."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from both import Both
from live_cluster import Cluster
from openai import BadRequestError, NotFoundError
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.timeout(120)

OPTIONS = (
    "--enable-scale-out", "--enable-auto-tool-choice", "--enable-tokenizer-info-endpoint",
    "--served-model-name", "demo", "org/name", "--compute-nans-in-logits", "--kv-cache-metrics",
    "--kv-cache-metrics-sample", "1",
)  # fmt: skip
ASK = "What is a prefill worker?"
TALK: Any = [{"role": "user", "content": ASK}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, GENERATE = "/v1/messages", "/inference/v1/generate"
COLD: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
           "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}
FORM = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
CONTEXT = 4096


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    with ExitStack() as stack:
        pair = stack.enter_context(Cluster("--prefill", "1", "--decode", "1", *OPTIONS))
        alone = stack.enter_context(Cluster("--colocated", "1", *OPTIONS))
        clients = Both((pair.url, alone.url))
        yield clients
        for cluster in (pair, alone):
            cluster.wait_until_clean(5)
        clients.close()


def text_of(body: Any) -> str:
    choice = body["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


# completions


@pytest.mark.parametrize(
    ("prompt", "count"), [("Hello", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
)
def test_prompts_of_every_kind(both: Both, prompt: Any, count: int) -> None:
    assert len(both.post(COMPLETIONS, prompt=prompt, **COLD)["choices"]) == count
    found = both.post(COMPLETIONS, prompt=prompt, n=2, **SEEDED)
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * count))


def test_scoring_a_prompt(both: Both) -> None:
    options = {"echo": True, "logprobs": 2, "return_token_ids": True}
    found = both.post(COMPLETIONS, prompt=ASK, max_tokens=0, **options, **COLD)
    (choice,) = found["choices"]
    scores = choice["logprobs"]
    assert choice["text"] == ASK and scores["token_logprobs"][0] is None
    assert len(scores["tokens"]) == found["usage"]["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == 0 and choice["finish_reason"] == "length"
    begun = "A prefill worker"
    more = both.post(COMPLETIONS, prompt=begun, max_tokens=5, **options, **COLD)["choices"][0]
    assert more["text"].startswith(begun) and len(more["text"]) > len(begun)
    assert more["logprobs"]["text_offset"][-1] < len(more["text"])
    listed = both.post(COMPLETIONS, prompt=ASK, prompt_logprobs=1, max_tokens=1, **COLD)
    assert len(listed["choices"][0]["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_streams_of_completions(both: Both, n: int) -> None:
    body = {"prompt": ["A router", "Who"], "n": n, "logprobs": 1, **SEEDED}
    whole = both.post(COMPLETIONS, **body)
    frames = both.frames(COMPLETIONS, **body, stream_options={"include_usage": True})
    (last,) = [frame for frame in frames if not frame["choices"]]
    assert frames[-1] is last and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        parts = [c for f in frames for c in f["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        scores = [t for part in parts if part["logprobs"] for t in part["logprobs"]["tokens"]]
        assert scores == choice["logprobs"]["tokens"]
        ends = [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert ends == [choice["finish_reason"]]


# what may be drawn


@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}, {"n": 3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"repetition_penalty": 1.3},
        {"min_tokens": 20}, {"ignore_eos": True, "max_tokens": 90}, {"logit_bias": {"5": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_seeded_answers_are_the_same_everywhere(both: Both, options: dict[str, Any]) -> None:
    body = {"messages": TALK, **SEEDED, **options, "return_token_ids": True}
    found = both.post(CHAT, **body)
    assert both.post(CHAT, **body)["choices"] == found["choices"]
    for choice in found["choices"]:
        if "min_tokens" in options:
            assert len(choice["token_ids"]) >= 20
        if "ignore_eos" in options:
            assert len(choice["token_ids"]) == 90 and choice["finish_reason"] == "length"


def test_stops(both: Both) -> None:
    plain = both.post(CHAT, messages=TALK, return_token_ids=True, **COLD)
    text, ids = text_of(plain), plain["choices"][0]["token_ids"]
    stop = text[9:14]
    assert text.index(stop) == 9
    for include in (False, True):
        options = {"stop": ["never", stop], "include_stop_str_in_output": include, **COLD}
        found = both.post(CHAT, messages=TALK, **options)
        assert text_of(found) == text[: 14 if include else 9]
        assert found["choices"][0]["stop_reason"] == stop
        frames = both.frames(CHAT, messages=TALK, **options)
        deltas = [frame["choices"][0]["delta"].get("content") or "" for frame in frames]
        assert "".join(deltas) == text_of(found)
    ended = both.post(CHAT, messages=TALK, stop_token_ids=[ids[0]], return_token_ids=True, **COLD)
    assert ended["choices"][0]["token_ids"] == ids[:1] and text_of(ended) == ""
    assert ended["choices"][0]["stop_reason"] == ids[0]


def test_rules_about_tokens(both: Both) -> None:
    plain = both.post(CHAT, messages=TALK, return_token_ids=True, **COLD)
    words = re.findall(r"[a-z]{4,}", text_of(plain))
    found = both.post(CHAT, messages=TALK, bad_words=words[:3], **COLD)
    assert not set(words[:3]) & set(re.findall(r"[a-z]+", text_of(found)))
    allowed = plain["choices"][0]["token_ids"][:4]
    found = both.post(
        CHAT, messages=TALK, allowed_token_ids=allowed, return_token_ids=True, **SEEDED
    )
    assert set(found["choices"][0]["token_ids"]) <= set(allowed)
    found = both.post(
        CHAT, messages=TALK, logprobs=True, logprob_token_ids=[5, 9], max_tokens=4, **COLD
    )
    for entry in found["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 3
    rule = {"max_pattern_size": 2, "min_count": 4}
    body = {"messages": TALK, "allowed_token_ids": allowed[:1], "ignore_eos": True, **COLD}
    found = both.post(CHAT, **body, max_tokens=50, repetition_detection=rule, return_token_ids=True)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "repetition" and len(choice["token_ids"]) == 4
    assert choice["stop_reason"] == "repetition_detected"


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c")'}}, "a[bc]"),
        ({"response_format": FORM}, r'\{\s*"city"\s*:\s*"(Rome|Oslo)"\s*\}'),
        ({"tools": [TOOL], "response_format": FORM}, r'\{\s*"city"\s*:\s*"(Rome|Oslo)"\s*\}'),
    ],
    ids=["choice", "regex", "grammar", "schema", "schema beside tools"],
)
def test_forms(both: Both, body: dict[str, Any], pattern: str) -> None:
    found = both.post(CHAT, messages=TALK, max_tokens=200, **body, **COLD)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, text_of(found))
    if "tools" not in body:
        seeded = both.post(COMPLETIONS, prompt=ASK, **body, **{**SEEDED, "max_tokens": 200})
        assert re.fullmatch(pattern, text_of(seeded))


# chat


def test_scores_cover_every_token(both: Both) -> None:
    found = both.post(CHAT, messages=TALK, logprobs=True, top_logprobs=3, **COLD)
    entries = found["choices"][0]["logprobs"]["content"]
    assert len(entries) == found["usage"]["completion_tokens"]
    for entry in entries:
        assert len(entry["top_logprobs"]) in (3, 4) and entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    listed = both.post(CHAT, messages=TALK, prompt_logprobs=2, max_tokens=1, **COLD)
    assert len(listed["prompt_logprobs"]) == listed["usage"]["prompt_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_streams_of_chat(both: Both, n: int) -> None:
    body = {"messages": TALK, "n": n, **SEEDED}
    whole = both.post(CHAT, **body)
    frames = both.frames(CHAT, **body, stream_options={"include_usage": True})
    assert [frame for frame in frames if not frame["choices"]] == frames[-1:]
    assert frames[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        parts = [c for f in frames for c in f["choices"] if c["index"] == index]
        deltas = [part["delta"] for part in parts]
        assert [d["role"] for d in deltas if "role" in d] == ["assistant"] and "role" in deltas[0]
        assert "".join(d.get("content") or "" for d in deltas) == choice["message"]["content"]
        ends = [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert ends == [choice["finish_reason"]]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(both: Both, choice: Any) -> None:
    body = {"messages": TALK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 90, **COLD}
    found = both.post(CHAT, **body)["choices"][0]
    (call, *_) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    frames = both.frames(CHAT, **body)
    deltas = [c for f in frames for d in f["choices"] for c in d["delta"].get("tool_calls") or ()]
    assert deltas[0]["function"] == {"name": "weather"} and deltas[0]["id"]
    joined = "".join(d["function"].get("arguments", "") for d in deltas if d["index"] == 0)
    assert joined == call["function"]["arguments"]
    history = [*TALK, {"role": "assistant", "tool_calls": [call]},
               {"role": "tool", "tool_call_id": call["id"], "content": "Sunny."}]  # fmt: skip
    assert text_of(both.post(CHAT, messages=history, tools=[TOOL], tool_choice="none", **COLD))


def test_the_official_helpers(both: Both) -> None:
    answer = both.openai(lambda c: c.chat.completions.create(model="demo", messages=TALK, **COLD))
    assert answer.choices[0].message.content and answer.object == "chat.completion"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    names = both.openai(lambda c: [model.id for model in c.models.list()])
    assert names == ["demo", "org/name"]
    card = both.openai(lambda c: c.models.retrieve("org/name"))
    assert card.id == "org/name" and card.max_model_len == CONTEXT
    for ask in (
        lambda c: c.models.retrieve("missing"),
        lambda c: c.chat.completions.create(model="nope", messages=TALK),
    ):
        with pytest.raises(NotFoundError) as caught:
            both.openai(ask)
        assert caught.value.param == "model"


def test_several_conversations(both: Both) -> None:
    other: Any = [{"role": "user", "content": "Who are you?"}]
    batch = both.post(f"{CHAT}/batch", messages=[TALK, other], max_tokens=20, **COLD)
    for choice, talk in zip(batch["choices"], (TALK, other), strict=True):
        alone = both.post(CHAT, messages=talk, max_tokens=20, **COLD)
        assert choice["message"] == alone["choices"][0]["message"]


def test_conversations_as_templates_see_them(both: Both) -> None:
    begun = [*TALK, {"role": "assistant", "content": "A prefill worker"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    found = both.post(CHAT, messages=begun, echo=True, **options, **COLD)
    assert text_of(found).startswith("A prefill worker") and len(text_of(found)) > 20
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"},
                                          {"type": "text", "text": "there"}]}]  # fmt: skip
    said = both.post(CHAT, messages=parts, return_prompt_text=True, max_tokens=1, **COLD)
    assert "Hithere" in said["prompt_text"]  # this template reads parts
    cut = both.post(CHAT, messages=TALK, truncate_prompt_tokens=4, return_token_ids=True, **COLD)
    assert len(cut["prompt_token_ids"]) == cut["usage"]["prompt_tokens"] == 4


# lengths and refusals


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": ""}, "prompt"), (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt"), (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "x", "suffix": ""}, "suffix"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options"),
        (COMPLETIONS, {"prompt": [5] * (CONTEXT + 1)}, "input_tokens"),
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": CONTEXT + 1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 5}, "body.stop"),
        (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        (CHAT, {"messages": TALK, "temperature": 3}, "temperature"),
        (CHAT, {"messages": TALK, "top_p": 0}, "top_p"),
        (CHAT, {"messages": TALK, "top_k": -2}, "top_k"),
        (CHAT, {"messages": TALK, "n": 2, "temperature": 0}, "n"),
        (CHAT, {"messages": TALK, "min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        (CHAT, {"messages": TALK, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": TALK, "logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        (CHAT, {"messages": TALK, "tools": []}, "tools"),
        (CHAT, {"messages": TALK, "tool_choice": "auto"}, "tool_choice"),
        (CHAT, {"messages": TALK, "max_completion_tokens": 10**9}, "max_completion_tokens"),
        (CHAT, {"messages": TALK, "continue_final_message": True}, "continue_final_message"),
        (CHAT, {"messages": TALK, "chat_template": "x"}, "chat_template"),
        (CHAT, {"messages": TALK, "cache_salt": "a/b"}, "cache_salt"),
        (CHAT, {"messages": TALK, "response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"messages": []}, "messages"), (CHAT, {}, "body.messages"),
        (CHAT, {"messages": TALK, "allowed_token_ids": []}, "allowed_token_ids"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64,AA=="}}]}]}, "messages"),
        (f"{CHAT}/batch", {"messages": TALK}, "body.messages"),
        (f"{CHAT}/batch", {"messages": [TALK], "stream": True}, "stream"),
        (RESPONSES, {"input": "x", "tool_choice": "required"}, "tool_choice"),
        (RESPONSES, {"input": "x", "background": True, "store": False}, "background"),
        (RESPONSES, {"input": "x", "prompt": {"id": "x"}}, "prompt"),
        (RESPONSES, {"input": []}, "input"),
        (GENERATE, {"token_ids": [], "sampling_params": {}}, "body.token_ids"),
        (GENERATE, {"token_ids": [1], "sampling_params": {}, "output_mode": "x"}, "output_mode"),
        ("/invocations", {}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "body.tokens.0"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(both: Both, path: str, body: dict[str, Any], param: str) -> None:
    error = both.post(path, status=400, **body)["error"]
    assert param in error["param"] and error["code"] == 400 and error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_an_answer_is_cut_where_the_context_ends(both: Both) -> None:
    found = both.post(
        COMPLETIONS, prompt=[5] * (CONTEXT - 3), max_tokens=50, ignore_eos=True, **COLD
    )
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 3


def test_nulls_and_unknown_fields(both: Both) -> None:
    nulls = dict.fromkeys(
        ("top_p", "n", "stop", "stream", "stream_options", "tools", "tool_choice", "logprobs",
         "top_logprobs", "seed", "response_format", "user", "logit_bias", "min_tokens",
         "parallel_tool_calls", "structured_outputs", "bad_words", "allowed_token_ids")
    )  # fmt: skip
    both.post(CHAT, messages=TALK, max_tokens=1, totally_unknown=1, best_of=1, **nulls, **COLD)


# responses


def test_responses(both: Both) -> None:
    body = {"input": ASK, **COLD}
    found = both.post(RESPONSES, **body)
    assert found["status"] == "completed" and found["error"] is None
    assert found["usage"]["total_tokens"] > 0
    frames = both.frames(RESPONSES, **body)
    assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
    assert frames[0]["type"] == "response.created" and frames[-1]["type"] == "response.completed"
    text = found["output"][0]["content"][0]["text"]
    assert "".join(f["delta"] for f in frames if f["type"] == "response.output_text.delta") == text
    short = both.post(RESPONSES, **body, max_output_tokens=1)
    assert short["incomplete_details"] == {"reason": "max_output_tokens"}
    scored = both.post(RESPONSES, **body, include=["message.output_text.logprobs"], top_logprobs=2)
    assert scored["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]
    pasted = [{"role": "user", "content": ASK}, *found["output"],
              {"role": "user", "content": "Why?"}]  # fmt: skip
    assert both.post(RESPONSES, input=pasted, **COLD)["status"] == "completed"


def test_responses_that_are_kept(both: Both) -> None:
    def chain(client: Any) -> Any:
        first = client.responses.create(model="demo", input=ASK, temperature=0)
        second = client.responses.create(
            model="demo", input="Say that again", previous_response_id=first.id, temperature=0
        )
        assert client.responses.retrieve(second.id).output_text == second.output_text
        items = [item.id for item in client.responses.input_items.list(first.id)]
        client.responses.delete(first.id)
        with pytest.raises(NotFoundError):
            client.responses.retrieve(first.id)
        return {"texts": [first.output_text, second.output_text], "items": len(items)}

    assert both.openai(chain)["items"] == 1


def test_calls_of_responses(both: Both) -> None:
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    body = {"tools": [tool], "max_output_tokens": 90, **COLD}
    found = both.post(RESPONSES, input=ASK, tool_choice="required", **body)
    call = next(item for item in found["output"] if item["type"] == "function_call")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny."}
    asked = [{"role": "user", "content": ASK}, call, result]
    answer = both.post(RESPONSES, input=asked, tool_choice="none", **body)
    assert answer["output"][0]["type"] == "message"
    text = {"format": {"type": "json_schema", "name": "w", "schema": WEATHER}}
    formed = both.post(RESPONSES, input=ASK, text=text, max_output_tokens=200, **COLD)
    assert json.loads(formed["output"][0]["content"][0]["text"])["city"] in ("Rome", "Oslo")


# Anthropic


def test_messages(both: Both) -> None:
    body: Any = {"model": "demo", "max_tokens": 200, "messages": TALK}
    found = both.anthropic(lambda c: c.messages.create(**body, extra_body=COLD))
    assert found.content[0].type == "text" and found.stop_reason == "end_turn"
    frames = both.frames(MESSAGES, **body, **COLD)
    kinds = [frame["type"] for frame in frames]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    deltas = [f["delta"]["text"] for f in frames if f["type"] == "content_block_delta"]
    assert "".join(deltas) == found.content[0].text
    counted = both.anthropic(lambda c: c.messages.count_tokens(model="demo", messages=TALK))
    assert counted.input_tokens == found.usage.input_tokens
    stop = found.content[0].text[5:9]
    stopped = both.post(MESSAGES, **body, stop_sequences=[stop], **COLD)
    assert stopped["stop_reason"] == "stop_sequence" and stopped["stop_sequence"] == stop
    assert both.post(MESSAGES, **{**body, "max_tokens": 1}, **COLD)["stop_reason"] == "max_tokens"
    tools = [{"name": "weather", "input_schema": WEATHER, "strict": True}]
    used = both.post(MESSAGES, **body, tools=tools, tool_choice={"type": "any"}, **COLD)
    block = next(block for block in used["content"] if block["type"] == "tool_use")
    assert used["stop_reason"] == "tool_use" and block["input"]["city"] in ("Rome", "Oslo")
    for wrong in ({"max_tokens": None}, {"messages": []}, {"model": ""}):
        error = both.post(MESSAGES, status=400, **{**body, **wrong})
        assert error["error"]["type"] == "invalid_request_error"


# tokens


def test_tokens_in_and_out(both: Both) -> None:
    ids = both.post("/tokenize", prompt=ASK)["tokens"]
    plain = both.post(COMPLETIONS, prompt=ASK, return_token_ids=True, **COLD)
    params = {"max_tokens": 16, "logprobs": 2, **COLD}
    found = both.post(GENERATE, token_ids=ids, sampling_params=params)
    (choice,) = found["choices"]
    assert choice["token_ids"] == plain["choices"][0]["token_ids"]
    for entry in choice["logprobs"]["content"]:
        assert entry["top_logprobs"][0]["token_id"] == entry["token_id"]
    frames = both.frames(GENERATE, token_ids=ids, sampling_params=params)
    assert [t for f in frames for c in f["choices"] for t in c["token_ids"]] == choice["token_ids"]


@pytest.mark.parametrize(
    "options",
    [{}, {"stop": ["the"]}, {"max_tokens": 9, "logprobs": True, "top_logprobs": 2},
     {"tools": [TOOL], "tool_choice": "required"}, {"response_format": FORM},
     {"bad_words": ["prompt"], **SEEDED}],
    ids=["plain", "stop", "scores", "tools", "schema", "bad words"],
)  # fmt: skip
def test_render_generate_derender(both: Both, options: dict[str, Any]) -> None:
    body = {"messages": TALK, "max_tokens": 90, **COLD, **options}
    direct = both.post(CHAT, **body)["choices"]
    rendered = both.post(f"{CHAT}/render", **body)
    generated = both.post(GENERATE, **rendered)
    back = both.post(
        f"{CHAT}/derender",
        generate_response=generated,
        prompt_tokens=len(rendered["token_ids"]),
        chat_request=body,
    )["choices"]
    calls = [c["message"].pop("tool_calls", []) for c in (*direct, *back)]
    assert [call["function"] for call in calls[0]] == [call["function"] for call in calls[1]]
    assert back == direct


def test_text_and_tokens(both: Both) -> None:
    for text in ("Hello, wörld ☃ 🎉", "a\n b", ""):
        found = both.post(
            "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True
        )
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == CONTEXT
        assert both.post("/detokenize", tokens=found["tokens"])["prompt"] == text
    talk = both.post("/tokenize", messages=TALK)
    used = both.post(CHAT, messages=TALK, max_tokens=1, **COLD)["usage"]["prompt_tokens"]
    assert talk["count"] == used
    assert both.post("/tokenize", status=404, prompt="x", model="nope")["error"]["param"] == "model"
    assert both.send("GET", "/tokenizer_info").json()["tokenizer_class"]


# around it


DASHBOARD = {
    f"vllm:{name}"
    for name in (
        "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason",
        "kv_cache_usage_perc", "cache_config_info", "prefix_cache_queries", "prefix_cache_hits",
        "num_preemptions", "prompt_tokens", "generation_tokens", "prompt_tokens_by_source",
        "prompt_tokens_cached", "request_success", "time_to_first_token_seconds",
        "inter_token_latency_seconds", "time_per_output_token_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_params_n",
        "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_max_num_generation_tokens", "admission_rejections",
        "request_params_max_tokens", "request_num_preemptions",
        "request_prefill_kv_computed_tokens", "prompt_tokens_cached_by_source",
        "prompt_tokens_recomputed", "external_prefix_cache_queries", "external_prefix_cache_hits",
        "iteration_tokens_total", "estimated_flops_per_gpu", "estimated_read_bytes_per_gpu",
        "estimated_write_bytes_per_gpu", "mm_cache_queries", "mm_cache_hits", "engine_sleep_state",
        "lora_requests_info", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos",
        "corrupted_requests", "kv_block_lifetime_seconds", "kv_block_idle_before_evict_seconds",
        "kv_block_reuse_gap_seconds", "nixl_xfer_time_seconds", "nixl_post_time_seconds",
        "nixl_bytes_transferred", "nixl_num_descriptors", "nixl_num_failed_transfers",
        "nixl_num_failed_notifications", "nixl_num_kv_expired_reqs",
    )
} | {
    "http_requests", "http_request_duration_seconds", "http_request_duration_highr_seconds",
    "http_request_size_bytes", "http_response_size_bytes", "python_info",
    "process_cpu_seconds", "python_gc_collections",
}  # fmt: skip
"""What existing dashboards read."""


def scraped(both: Both) -> dict[str, Metric]:
    text = both.send("GET", "/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def each_worker(family: Metric, ending: str) -> list[float]:
    found = [sample.value for sample in family.samples if sample.name.endswith(ending)]
    return found or [0.0]


def test_the_server_itself(both: Both) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        answer = both.send(method, path)
        assert answer.status_code == 200 and not answer.content
    assert both.send("GET", "/version").json()["version"]
    assert both.send("GET", "/load").json() == {"server_load": 0}
    assert both.send("GET", "/kv_event_sources").json() == {}
    metrics = both.send("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    families = scraped(both)
    assert not DASHBOARD - families.keys()
    assert all(sample.value > 0 for sample in families["vllm:estimated_flops_per_gpu"].samples)
    end = time.monotonic() + 10
    while not all(each_worker(scraped(both)["vllm:iteration_tokens_total"], "_sum")):
        assert time.monotonic() < end, "no heartbeat has told of the steps"
        time.sleep(0.05)
    families = scraped(both)
    assert any(each_worker(families["vllm:nixl_bytes_transferred"], "_sum"))
    assert each_worker(families["vllm:corrupted_requests"], "_total") == [0, 0]
    chat = both.post("/invocations", messages=TALK, model="whatever", max_tokens=5, **COLD)
    assert text_of(chat) == text_of(both.post(CHAT, messages=TALK, max_tokens=5, **COLD))
    headers = {"x-request-id": "abc"}
    named = both.send("POST", CHAT, {"messages": TALK, "max_tokens": 1}, headers=headers)
    assert named.json()["id"] == "chatcmpl-abc" and named.headers["x-request-id"] == "abc"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405)):
        answer = both.send(method, path)
        assert answer.status_code == status and answer.json()["error"]["code"] == status
    with pytest.raises(BadRequestError):
        both.openai(lambda c: c.completions.create(model="demo", prompt=""))
