"""Several conversations in one request: each is answered as if it came alone."""

from __future__ import annotations

from typing import Any

import pytest
from router_harness import TEXT, RouterHarness

PATH = "/v1/chat/completions/batch"
ONE: list[Any] = [{"role": "user", "content": "Hi"}]
TWO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]


def post(harness: RouterHarness, path: str, **body: Any) -> Any:
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 6},
        {"seed": 4, "temperature": 1, "logprobs": True, "top_logprobs": 2, "request_id": "x"},
        {"return_token_ids": True, "return_prompt_text": True, "prompt_logprobs": 0},
        {"echo": True, "continue_final_message": True, "add_generation_prompt": False},
    ],
)
def test_the_same_as_one_by_one(harness: RouterHarness, options: dict[str, Any]) -> None:
    talks = [ONE, TWO, ONE]
    if options.get("echo"):
        talks = [[*talk, {"role": "assistant", "content": f"{len(talk)} "}] for talk in talks]
    batch = post(harness, PATH, messages=talks, **options)
    alone = [post(harness, "/v1/chat/completions", messages=talk, **options) for talk in talks]
    assert batch["object"] == "chat.completion" and batch["id"].startswith("chatcmpl-")
    about = ("prompt_logprobs", "prompt_token_ids", "prompt_text")
    for index, (choice, single) in enumerate(zip(batch["choices"], alone, strict=True)):
        (expected,) = single["choices"]
        assert choice == expected | {"index": index} | {name: single[name] for name in about}
    assert not set(about) & set(batch)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert batch["usage"][name] == sum(single["usage"][name] for single in alone)


def test_each_conversation_reaches_a_worker(harness: RouterHarness) -> None:
    worker = harness.workers[0]
    worker.submits.clear()
    answer = post(harness, PATH, messages=[ONE, TWO])
    assert [choice["message"]["content"] for choice in answer["choices"]] == [TEXT, TEXT]
    prompts = sorted(len(submit.prompt_token_ids) for submit in worker.submits)
    assert sum(prompts) == answer["usage"]["prompt_tokens"] and prompts[0] < prompts[1]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", ""),
        ({"messages": [[]]}, "messages", ""),
        ({"messages": ONE}, "messages", ""),
        ({"messages": [ONE, [{"role": "user", "content": None}]]}, "messages", "Conversation 1"),
        ({"stream": True}, "stream", "batch"),
        ({"stream_options": {}}, "stream_options", "batch"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "batch"),
        ({"tool_choice": "auto"}, "tool_choice", "batch"),
        ({"n": 2, "temperature": 1}, "n", "must be 1"),
        ({"use_beam_search": True}, "use_beam_search", ""),
        ({"kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params", ""),
        ({"messages": [ONE] * 1025}, "messages", "1024"),
    ],
)
def test_what_is_refused(
    harness: RouterHarness, change: dict[str, Any], param: str, words: str
) -> None:
    answer = harness.client.post(PATH, json={"messages": [ONE]} | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param in error["param"] and words in error["message"]


def test_harmless_values_pass(harness: RouterHarness) -> None:
    plain = {"stream": False, "stream_options": None, "tools": None, "tool_choice": "none", "n": 1}
    assert len(post(harness, PATH, messages=[ONE], **plain)["choices"]) == 1
