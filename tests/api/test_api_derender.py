"""Render, generate, derender: together they say what the endpoint says, whole or in parts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from response_events import events
from router_harness import TEXT, RouterHarness

from pdserve.cluster.records import Role

HI: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GENERATE = "/inference/v1/generate"
TOOLS = [{"type": "function", "function": {"name": "now"}}]
CALL = 'Let me see. <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WITH_CALL = {"tools": TOOLS}


@pytest.fixture(scope="module")
def scaled(redis_url: str) -> Iterator[RouterHarness]:
    with RouterHarness(redis_url, enable_scale_out=True, enable_auto_tool_choice=True) as running:
        running.add(Role.PREFILL)
        running.add(Role.DECODE)
        running.until_connected()
        yield running
        running.until_idle()


def post(harness: RouterHarness, path: str, body: Any) -> Any:
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def say(harness: RouterHarness, text: str) -> None:
    for worker in harness.workers:
        worker.script = harness.answer(text)


def told(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what is different each time."""
    kept = {key: value for key, value in body.items() if key not in ("id", "created", "usage")}
    text = json.dumps(kept)
    for choice in body["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            text = text.replace(call["id"], "ID")
    return json.loads(text)  # type: ignore[no-any-return]


CASES: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {}),
    (TEXT, {"max_tokens": 7}),
    (TEXT, {"stop": ["wor"], "logprobs": True, "top_logprobs": 2}),
    (TEXT, {"return_token_ids": True, "return_prompt_text": True, "prompt_logprobs": 1}),
    (TEXT, {"n": 2, "temperature": 1, "seed": 3}),
    (CALL, WITH_CALL),
    (CALL * 2, {**WITH_CALL, "parallel_tool_calls": False, "logprobs": True}),
]


@pytest.mark.parametrize(("text", "options"), CASES)
def test_a_chat(scaled: RouterHarness, text: str, options: dict[str, Any]) -> None:
    say(scaled, text)
    body = {"messages": HI, **options}
    direct = post(scaled, CHAT, body)
    rendered = post(scaled, f"{CHAT}/render", body)
    generated = post(scaled, GENERATE, rendered)
    about = {"prompt_tokens": len(rendered["token_ids"]), "chat_request": body}
    back = post(scaled, f"{CHAT}/derender", {"generate_response": generated, **about})
    assert told(back) == told(direct)
    assert back["id"] == generated["request_id"] and back["usage"] == direct["usage"]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ["One", "Two ☃"], "max_tokens": 9},
        {"prompt": "One", "echo": True, "logprobs": 2, "max_tokens": 5},
        {"prompt": "One", "echo": True, "logprobs": 2, "max_tokens": 0},
        {"prompt": [5, 6, 7], "stop": ["wor"], "n": 2, "temperature": 1, "seed": 1},
    ],
)
def test_completions(scaled: RouterHarness, options: dict[str, Any]) -> None:
    say(scaled, TEXT)
    direct = post(scaled, COMPLETIONS, options)
    rendered = post(scaled, f"{COMPLETIONS}/render", options)
    body = {
        "generate_responses": [post(scaled, GENERATE, one) for one in rendered],
        "prompt_tokens": [len(one["token_ids"]) for one in rendered],
        "prompt_token_ids": [one["token_ids"] for one in rendered],
        "completion_request": options,
    }
    back = post(scaled, f"{COMPLETIONS}/derender", body)
    assert told(back) == told(direct) and back["usage"] == direct["usage"]


def test_a_response(scaled: RouterHarness) -> None:
    say(scaled, CALL)
    tools = [{"type": "function", "name": "now"}]
    body = {"input": "Hi", "tools": tools, "store": False, "request_id": "resp_mine"}
    direct = post(scaled, RESPONSES, body)
    rendered = post(scaled, f"{RESPONSES}/render", body)
    assert rendered["request_id"] == "resp_mine"
    generated = post(scaled, GENERATE, rendered)
    about = {"prompt_tokens": len(rendered["token_ids"]), "responses_request": body}
    back = post(scaled, f"{RESPONSES}/derender", {"generate_response": generated, **about})
    kinds = [item["type"] for item in back["output"]]
    assert kinds == [item["type"] for item in direct["output"]] == ["message", "function_call"]
    assert back["output"][0]["content"] == direct["output"][0]["content"]
    assert back["usage"] == direct["usage"] and back["status"] == "completed"
    for change in ({"previous_response_id": "resp_x"}, {"input": []}):
        answer = scaled.client.post(f"{RESPONSES}/render", json=body | change)
        assert answer.status_code == 400 and next(iter(change)) in answer.json()["error"]["param"]


def streamed(
    scaled: RouterHarness, path: str, body: dict[str, Any], about: dict[str, Any], size: int
) -> list[dict[str, Any]]:
    """The chunks of each choice in turn, from tokens `size` at a time."""
    generated = post(scaled, GENERATE, body)
    found = []
    for choice in generated["choices"]:
        state, ids, scores = None, choice["token_ids"], choice["logprobs"]
        for place in range(0, len(ids), size):
            last = place + size >= len(ids)
            part = {
                "index": choice["index"],
                "token_ids": ids[place : place + size],
                "finish_reason": choice["finish_reason"] if last else None,
                "stop_reason": choice["stop_reason"] if last else None,
                "logprobs": scores and {"content": scores["content"][place : place + size]},
            }
            usage = generated["usage"] if last else None
            chunk = {"request_id": generated["request_id"], "choices": [part], "usage": usage}
            asked = {"stream": True, "generate_chunk": chunk, "stream_state": state, **about}
            answer = post(scaled, path, asked)
            state = answer["stream_state"]
            found += answer["events"] if "events" in answer else filter(None, [answer["chunk"]])
    return found


@pytest.mark.parametrize(("text", "size"), [(CALL, 1), (CALL, 4), ("It is é.", 3)])
def test_a_response_in_parts(scaled: RouterHarness, text: str, size: int) -> None:
    """The events are those of the stream, but for ids and how the text is cut."""
    say(scaled, text)
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = {
        "input": "Hi",
        "tools": [{"type": "function", "name": "now"}],
        "store": False,
        "request_id": "resp_mine",
        **options,
    }
    direct = scaled.client.post(RESPONSES, json=body | {"stream": True})
    wanted = [{"type": kind, **content} for kind, content in events(direct.text)]
    rendered = post(scaled, f"{RESPONSES}/render", body)
    about = {"prompt_tokens": len(rendered["token_ids"]), "responses_request": body}
    found = streamed(scaled, f"{RESPONSES}/derender", rendered, about, size)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))

    def kinds(listed: list[dict[str, Any]]) -> list[str]:
        return [kind for kind, _ in itertools.groupby(event["type"] for event in listed)]

    assert kinds(found) == kinds(wanted)
    final, last = found[-1]["response"], wanted[-1]["response"]
    for event in found:
        if "item_id" in event:
            assert event["item_id"] == final["output"][event["output_index"]]["id"]
    whole = post(scaled, RESPONSES, body)["output"]
    for items in zip(final["output"], last["output"], whole, strict=True):
        first, second, third = ({**item, "id": 0, "call_id": 0} for item in items)
        assert first == second == third
    assert final["usage"] == last["usage"] and final["id"] == "generate-tokens-resp_mine"
    for kind in ("response.output_text.delta", "response.function_call_arguments.delta"):
        texts = [
            "".join(event["delta"] for event in listed if event["type"] == kind)
            for listed in (found, wanted)
        ]
        assert texts[0] == texts[1]
    state: dict[str, Any] = {
        "output_token_ids": [5],
        "output_chunk_lens": [1],
        "role_sent": True,
        "created": 1,
    }
    chunk = {"request_id": "r", "choices": [{"token_ids": [6], "finish_reason": None}]}
    state |= {"names": [["a", ""]] * 9, "role_sent": True}
    broken = {"stream": True, "generate_chunk": chunk, "stream_state": state}
    about["responses_request"] = body | {"include": []}
    answer = scaled.client.post(f"{RESPONSES}/derender", json=broken | about)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_state"


@pytest.mark.parametrize(
    ("case", "size"), [(0, 1), (2, 3), (4, 7), (5, 2)], ids=["plain", "scores", "two", "call"]
)
def test_a_chat_in_parts(scaled: RouterHarness, case: int, size: int) -> None:
    text, options = CASES[case]
    say(scaled, text)
    body = {"messages": HI, **options}
    direct = post(scaled, CHAT, body)
    rendered = post(scaled, f"{CHAT}/render", body)
    about = {"prompt_tokens": len(rendered["token_ids"]), "chat_request": body}
    chunks = streamed(scaled, f"{CHAT}/derender", rendered, about, size)
    for whole in direct["choices"]:
        parts = [c for k in chunks for c in k["choices"] if c["index"] == whole["index"]]
        deltas = [part["delta"] for part in parts]
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        content = "".join(delta.get("content") or "" for delta in deltas)
        assert content == (whole["message"]["content"] or "")
        calls: list[dict[str, str]] = []
        for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
            if "id" in call:
                calls.append(dict(call["function"]))
            else:
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
        assert calls == [call["function"] for call in whole["message"].get("tool_calls", ())]
        assert [part["finish_reason"] for part in parts][:-1] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == whole["finish_reason"]
        assert parts[-1]["stop_reason"] == whole["stop_reason"]
        if "logprobs" in options:
            scores = [one for part in parts for one in part["logprobs"]["content"]]
            assert scores == whole["logprobs"]["content"]


def test_a_completion_in_parts_and_its_usage(scaled: RouterHarness) -> None:
    say(scaled, TEXT)
    body = {"prompt": "One", "echo": True}
    direct = post(scaled, COMPLETIONS, body)
    (rendered,) = post(scaled, f"{COMPLETIONS}/render", body)
    about = {"prompt_tokens": 1, "completion_request": body}
    chunks = streamed(scaled, f"{COMPLETIONS}/derender", rendered, about, 1)
    assert "".join(k["choices"][0]["text"] for k in chunks) == direct["choices"][0]["text"]
    last = {"request_id": "r", "choices": [], "usage": direct["usage"]}
    asked = {"stream": True, "generate_chunk": last, "stream_state": None, **about}
    answer = post(scaled, f"{COMPLETIONS}/derender", asked)
    assert answer["chunk"]["usage"] == direct["usage"] and answer["chunk"]["choices"] == []


def test_without_the_request(start: Any) -> None:
    """Where no parser is configured, tokens are enough."""
    harness = start(enable_scale_out=True, tool_call_parser="none")
    ids = harness.router.model.tokenizer.encode(TEXT, False)
    eos = harness.router.model.eos_token_ids[0]
    choice = {"index": 0, "token_ids": [*ids, eos], "finish_reason": "stop"}
    response = {"request_id": "r", "choices": [choice]}
    answer = post(harness, f"{CHAT}/derender", {"generate_response": response, "prompt_tokens": 9})
    assert answer["choices"][0]["message"]["content"] == TEXT and answer["id"] == "r"
    assert answer["usage"]["total_tokens"] == 9 + len(ids) + 1
    body = {"generate_responses": [response], "prompt_tokens": [9]}
    assert post(harness, f"{COMPLETIONS}/derender", body)["choices"][0]["text"] == TEXT


GOOD: dict[str, Any] = {"request_id": "r", "choices": [{"token_ids": [5], "finish_reason": "stop"}]}
PART: dict[str, Any] = {"request_id": "r", "choices": [{"token_ids": [5]}]}
STATE = {"output_token_ids": [5, 6], "output_chunk_lens": [1, 1], "role_sent": True}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"generate_response": None}, "generate_response"),
        ({"generate_response": GOOD | {"output_mode": "text"}}, "generate_response"),
        ({"generate_response": PART}, "finish_reason"),
        ({"generate_response": GOOD | {"choices": []}}, "choices"),
        ({"generate_response": GOOD | {"choices": [{"token_ids": [10**6], "index": 0}]}}, "token"),
        ({"prompt_token_ids": [1]}, "prompt_token_ids"), ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"chat_request": None}, "chat_request"), ({"chat_request": {"messages": []}}, "messages"),
        ({"chat_request": {"messages": HI, "logprobs": True}}, "logprobs"),
        ({"stream": True}, "generate_chunk"),
        ({"stream": True, "generate_chunk": PART, "stream_state": STATE | {"output_chunk_lens":
            [1]}}, "stream_state"),
        ({"stream": True, "generate_chunk": PART, "stream_state": STATE | {"output_token_ids":
            [10**6], "output_chunk_lens": [1]}}, "stream_state"),
        ({"stream": True, "generate_chunk": PART, "stream_state": {}}, "stream_state"),
        ({"model": "nope"}, "model"),
    ],
)  # fmt: skip
def test_what_does_not_fit(scaled: RouterHarness, change: dict[str, Any], param: str) -> None:
    good = {"prompt_tokens": 2, "chat_request": {"messages": HI}, "generate_response": GOOD}
    assert scaled.client.post(f"{CHAT}/derender", json=good).status_code == 200
    answer = scaled.client.post(f"{CHAT}/derender", json=good | change)
    assert answer.status_code in (400, 404), answer.text
    assert param in answer.json()["error"]["param"]


def test_long_answers_are_made_beside_others(scaled: RouterHarness) -> None:
    """And only so many at once."""
    choices = [
        {"index": n, "token_ids": [300] * 4000, "finish_reason": "length"} for n in range(40)
    ]
    response = {"request_id": "r", "choices": choices[:32]}
    body = {"generate_responses": [response], "prompt_tokens": [1]}
    found = post(scaled, f"{COMPLETIONS}/derender", body)
    assert found["usage"]["completion_tokens"] == 32 * 4000
    assert len({choice["text"] for choice in found["choices"]}) == 1
    body["generate_responses"] = [response | {"choices": choices}]
    answer = scaled.client.post(f"{COMPLETIONS}/derender", json=body)
    assert answer.status_code == 400 and "131072" in answer.json()["error"]["message"]


def test_completions_that_do_not_fit(scaled: RouterHarness) -> None:
    good = {"generate_responses": [GOOD], "prompt_tokens": [1], "prompt_token_ids": [[5]]}
    assert scaled.client.post(f"{COMPLETIONS}/derender", json=good).status_code == 200
    for change in (
        {"generate_responses": [GOOD, GOOD]},
        {"prompt_tokens": [1, 1]},
        {"prompt_tokens": []},
        {"prompt_token_ids": [[5], [6]]},
        {"completion_request": {"prompt": ["a", "b"]}},
    ):
        answer = scaled.client.post(f"{COMPLETIONS}/derender", json=good | change)
        assert answer.status_code == 400, answer.text


def test_an_answer_without_choices(scaled: RouterHarness) -> None:
    nothing = {"request_id": "a", "created": 0, "choices": [], "usage": None}
    body = {"prompt_tokens": [3], "generate_responses": [nothing]}
    assert post(scaled, f"{COMPLETIONS}/derender", body)["choices"] == []
