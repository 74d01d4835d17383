"""/v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from router_harness import TEXT, RouterHarness


def joined(chunks: Any, index: int = 0) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hi", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_kind_of_prompt(client: OpenAI, prompt: Any, count: int, stream: bool) -> None:
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=99, stream=stream)
    if stream:
        chunks = list(answer)
        assert [joined(chunks, index) for index in range(count)] == [TEXT] * count
    else:
        assert [choice.text for choice in answer.choices] == [TEXT] * count


def test_prompts_times_answers(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], n=2, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage and answer.usage.completion_tokens == 4 * 16
    assert answer.usage.prompt_tokens == 2
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_sixteen_tokens_by_default(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="x", max_tokens=None)
    assert answer.usage and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Say ☃:", [40, 41, 42]])
def test_echo(client: OpenAI, harness: RouterHarness, prompt: Any, stream: bool) -> None:
    tokenizer = harness.router.model.tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.core.decode(prompt)
    answer = client.completions.create(
        model="demo", prompt=prompt, echo=True, max_tokens=99, stream=stream
    )
    found = joined(answer) if stream else answer.choices[0].text
    assert found == text + TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="demo", prompt="Say hi:", echo=True, max_tokens=99, logprobs=2, stream=stream
    )
    if stream:
        parts = [c for chunk in answer for c in chunk.choices if c.logprobs]
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.logprobs.tokens]
        values = [value for part in parts for value in part.logprobs.token_logprobs]
        offsets = [offset for part in parts for offset in part.logprobs.text_offset]
    else:
        choice = answer.choices[0]
        text, found = choice.text, choice.logprobs
        tokens, values, offsets = found.tokens, found.token_logprobs, found.text_offset
        assert found.top_logprobs[0] is None
        assert all(1 <= len(top) <= 3 for top in found.top_logprobs[1:])
        assert len(tokens) == answer.usage.total_tokens
    assert text == "Say hi:" + TEXT
    assert values[0] is None and all(isinstance(value, float) for value in values[1:])
    assert len(tokens) == len(values) == len(offsets) and offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        if token.isascii() and not token.startswith("<|"):
            assert text[offset : offset + len(token)] == token


def test_scoring_a_prompt(client: OpenAI) -> None:
    prompt = "The sky is blue."
    answer = client.completions.create(
        model="demo", prompt=prompt, echo=True, max_tokens=0, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == prompt and choice.finish_reason == "length"
    assert choice.logprobs and choice.logprobs.token_logprobs
    assert choice.logprobs.token_logprobs[0] is None
    assert answer.usage and answer.usage.completion_tokens == 0
    assert choice.logprobs.tokens and len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert choice.model_extra and choice.model_extra["prompt_logprobs"]


def test_logprobs_zero_is_only_the_token(client: OpenAI) -> None:
    choice = client.completions.create(model="demo", prompt="x", logprobs=0).choices[0]
    assert choice.logprobs and choice.logprobs.top_logprobs
    assert all(len(top) == 1 for top in choice.logprobs.top_logprobs)
    named = client.completions.create(
        model="demo", prompt="x", logprobs=0, extra_body={"return_tokens_as_token_ids": True}
    )
    logprobs = named.choices[0].logprobs
    assert logprobs and logprobs.tokens
    assert all(token.startswith("token_id:") for token in logprobs.tokens)


def test_truncation(client: OpenAI, harness: RouterHarness) -> None:
    for side, expected in (("left", [5, 6, 7]), ("right", [1, 2, 3])):
        extra = {"truncate_prompt_tokens": 3, "truncation_side": side}
        answer = client.completions.create(
            model="demo", prompt=[1, 2, 3, 4, 5, 6, 7], extra_body=extra
        )
        assert harness.workers[0].submits[-1].prompt_token_ids == expected
        assert answer.usage and answer.usage.prompt_tokens == 3
    long = [1] * (harness.router.model.max_len + 50)
    client.completions.create(
        model="demo", prompt=long, max_tokens=20, extra_body={"truncate_prompt_tokens": -1}
    )
    sent = harness.workers[0].submits[-1]
    assert len(sent.prompt_token_ids) == harness.router.model.max_len - 20


def test_what_a_worker_gets(client: OpenAI, harness: RouterHarness) -> None:
    """Every sampling field arrives, and so do the model's eos tokens."""
    client.completions.create(
        model="demo", prompt=[7, 8], max_tokens=9, temperature=0.5, top_p=0.9, seed=3,
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"4": 1.5}, logprobs=1,
        extra_body={"top_k": 11, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2,
                    "stop_token_ids": [9], "ignore_eos": True, "cache_salt": "me"},
    )  # fmt: skip
    for worker in harness.workers:
        submit = worker.submits[-1]
        sampling = submit.sampling
        assert (submit.prompt_token_ids, submit.cache_salt) == ([7, 8], "me")
        assert 0 < submit.timeout_s <= harness.settings.request_timeout_s
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 11)
        assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.05, 1.1, 3)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
        assert sampling.logit_bias == {4: 1.5} and sampling.stop_token_ids == (9,)
        assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (2, 9, True)
        assert sampling.eos_token_ids == (2, 0) and sampling.logprobs == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": ""}, "Either prompt or prompt_embeds must be provided and non-empty"),
        ({}, "Either prompt or prompt_embeds must be provided and non-empty"),
        ({"prompt": []}, "You must pass at least one prompt"),
        ({"prompt": [[]]}, "The decoder prompt cannot be empty"),
        ({"prompt": [True, 2]}, "prompt"),
        ({"prompt": [99999]}, "Token id 99999 is out of vocabulary"),
        ({"prompt": ["x"] * 1025}, "at most 1024 prompts"),
        ({"prompt": "x", "suffix": ""}, "suffix"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": "x", "logprobs": 21}, "logprobs must be at most 20"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream=True"),
        ({"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "x", "truncate_prompt_tokens": 10**6}, "smaller truncation size"),
        ({"prompt": "x", "cache_salt": "a/b"}, "cache_salt"),
        ({"prompt": [1] * 5000}, "maximum context length"),
        ({"prompt": "a b " * 4000}, "maximum context length is 4096 tokens"),
        ({"prompt": "x" * 10**6}, "maximum context length"),
        ({"prompt": [1] * 4096}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_what_is_refused(harness: RouterHarness, body: Any, text: str) -> None:
    answer = harness.client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert text in error["message"] and error["param"] and error["code"] == 400


def test_best_of_and_unknown_fields_pass(client: OpenAI) -> None:
    extra = {"best_of": 1, "totally_unknown": 1}
    assert client.completions.create(model="demo", prompt="x", extra_body=extra).choices


def test_tokenize_and_back(harness: RouterHarness) -> None:
    post = harness.client.post
    for text in ("Hello there", "emoji 👍🏽 ☃", "", "<|im_end|>"):
        body = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        found = post("/tokenize", json=body).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == harness.router.model.max_len
        back = post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back == {"prompt": text}
    assert post("/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"] == [2]


def test_tokenize_a_conversation(client: OpenAI, harness: RouterHarness) -> None:
    messages: Any = [{"role": "user", "content": "How are you?"}]
    answer = client.chat.completions.create(model="demo", messages=messages)
    found = harness.client.post("/tokenize", json={"messages": messages}).json()
    assert answer.usage and found["count"] == answer.usage.prompt_tokens
    assert found["token_strs"] is None


def test_detokenize_limits(harness: RouterHarness) -> None:
    answer = harness.client.post("/detokenize", json={"tokens": [-1]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "body.tokens.0"
    assert harness.client.post("/detokenize", json={"tokens": [10**6]}).json() == {"prompt": ""}
    assert harness.client.post("/tokenize", json={"model": "x", "prompt": "a"}).status_code == 404


def test_an_unknown_model_is_a_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nope", prompt="x")
    assert caught.value.param == "model" and "Valid aliases: demo, org/name" in str(caught.value)


def test_each_answer_of_a_stream_begins_with_its_own_prompt(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="demo", prompt=["One", "Two three four"], echo=True, logprobs=1, stream=True,
            max_tokens=99, extra_body={"return_token_ids": True},
        )
    )  # fmt: skip
    for index, prompt in enumerate(("One", "Two three four")):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(choice.text for choice in mine) == prompt + TEXT
        first, later = mine[0].model_extra, [c.model_extra for c in mine[1:]]
        assert first and first["prompt_token_ids"]
        assert not any(extra and extra.get("prompt_token_ids") for extra in later)
        tokens = [token for c in mine if c.logprobs for token in c.logprobs.tokens or []]
        assert "".join(token for token in tokens if token.isascii()).startswith(prompt)
