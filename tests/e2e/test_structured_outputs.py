"""Constrained answers of the demo model: they hold, and are the same, wherever they are drawn."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_cluster import Cluster, is_clean, metrics
from openai import AsyncOpenAI, BadRequestError

pytestmark = pytest.mark.timeout(240)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["prefill", "decode"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0},
                  "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}  # fmt: skip
SMALL = {"type": "object", "properties": {"kind": SCHEMA["properties"]["kind"]},  # type: ignore[index]
         "required": ["kind"], "additionalProperties": False}  # fmt: skip
JSON = {"json": SCHEMA, "whitespace_pattern": " ?"}
WISHES: dict[str, dict[str, Any]] = {
    "json": {"structured_outputs": JSON},
    "format": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": SMALL}}, "max_tokens": 200},
    "long": {"structured_outputs": {"regex": r"[0-9]{5}"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no", "it depends"]},
               "presence_penalty": 1.5},
    "regex": {"structured_outputs": {"regex": r"[0-9]{3}-[a-f]{4}"}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= ("left" | "right") (" " "up")*'},
                "max_tokens": 20},
    "tags": {"max_tokens": 200, "structured_outputs": {"structural_tag": {"format": {
        "type": "tags_with_separator", "separator": "", "at_least_one": True,
        "stop_after_first": True, "tags": [{"begin": "<f>", "end": "</f>", "content": {
            "type": "json_schema", "json_schema": SMALL}}]}}}},
}  # fmt: skip
PROMPT: Any = [{"role": "user", "content": "What is a prefill worker?"}]
LONG: Any = [{"role": "user", "content": "What is a prefill worker? " * 60}]
"""Of several steps: its hand-over begins while it is computed, and the grammar is compiled."""


def check(name: str, text: str, reason: str) -> None:
    if name == "grammar":
        assert re.match(r"(left|right)( up)*", text)
        return
    assert reason == "stop", (name, text)
    if name == "choice":
        assert text in ("yes", "no", "it depends")
    elif name == "long":
        assert re.fullmatch(r"[0-9]{5}", text)
    elif name == "regex":
        assert re.fullmatch(r"[0-9]{3}-[a-f]{4}", text)
    else:
        answer = json.loads(text.removeprefix("<f>").removesuffix("</f>"))
        assert answer.pop("kind") in ("prefill", "decode")
        if name == "json":
            assert set(answer) == {"name", "sizes"} and len(answer["name"]) <= 12
            assert 2 <= len(answer["sizes"]) <= 4


async def ask(client: AsyncOpenAI, name: str, **options: Any) -> str:
    extra = {"max_tokens": 120, **WISHES[name]} if name else {"max_tokens": 30}
    answer = await client.chat.completions.create(
        model="demo", messages=LONG if name == "long" else PROMPT, extra_body=extra, **options
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    if name:
        for text, choice in zip(texts, answer.choices, strict=True):
            check(name, text, choice.finish_reason)
    return "\n".join(texts)


async def everything(url: str) -> dict[str, list[str]]:
    """Each alone, then all at once beside requests without a grammar."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        names = [*WISHES, ""]
        seeded: dict[str, Any] = {"temperature": 1.0, "seed": 11}
        alone = [await ask(client, name, temperature=0) for name in names]
        greedy = await asyncio.gather(*(ask(client, name, temperature=0) for name in names))
        drawn = await asyncio.gather(
            *(ask(client, name, n=1 + (name == "json"), **seeded) for name in names)
        )
        assert list(greedy) == alone
        return {"greedy": list(greedy), "seeded": list(drawn)}


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with Cluster("--prefill", 1, "--decode", 2, "--max-num-batched-tokens", 64) as cluster:
        yield cluster


def test_the_same_constrained_answers_on_both_topologies(pair: Cluster) -> None:
    split = asyncio.run(everything(pair.url))
    pair.wait_until_clean()
    prefill = pair.worker("prefill")
    assert metrics(prefill["host"], prefill["http_port"])["tickets_early"] > 0
    with Cluster("--colocated", 1) as cluster:
        assert asyncio.run(everything(cluster.url)) == split
        cluster.wait_until_clean()


async def _killed_on_its_way(cluster: Cluster) -> tuple[str, str, int]:
    """A stream whose decode worker is killed under it, and the same undisturbed."""
    wish = {"json": {"type": "array", "items": SCHEMA, "minItems": 5, "maxItems": 5},
            "whitespace_pattern": " ?"}  # fmt: skip
    options: Any = {
        "model": "demo", "messages": PROMPT, "temperature": 1.0, "seed": 3,
        "max_tokens": 1500, "extra_body": {"structured_outputs": wish},
    }  # fmt: skip
    decoding = [record for record in cluster.workers() if record["role"] == "decode"]
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        undisturbed = await client.chat.completions.create(**options)
        pieces: list[str] = []
        killed = 0
        stream = await client.chat.completions.create(stream=True, **options)
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            if len(pieces) == 10:
                killed = await asyncio.to_thread(kill_the_busy_one, decoding)
        return "".join(pieces), undisturbed.choices[0].message.content or "", killed


TOOL = {"type": "function", "function": {
    "name": "scale", "strict": True, "parameters": {"type": "object", "properties": {
        "kind": SCHEMA["properties"]["kind"],  # type: ignore[index]
        "count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["kind", "count"], "additionalProperties": False}}}  # fmt: skip


async def _forced(url: str) -> list[Any]:
    """The calls of each forced choice, whole and streamed."""
    found = []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for choice in ("required", {"type": "function", "function": {"name": "scale"}}):
            options: Any = {
                "model": "demo", "messages": PROMPT, "tools": [TOOL], "tool_choice": choice,
                "temperature": 1.0, "seed": 5, "max_tokens": 200, "parallel_tool_calls": False,
            }  # fmt: skip
            answer = await client.chat.completions.create(**options)
            assert answer.choices[0].finish_reason == "tool_calls"
            calls = answer.choices[0].message.tool_calls or []
            async with client.chat.completions.stream(**options) as stream:
                final = (await stream.get_final_completion()).choices[0]
            assert final.finish_reason == "tool_calls"
            for whole, streamed in zip(calls, final.message.tool_calls or [], strict=True):
                assert whole.function.arguments == streamed.function.arguments  # type: ignore[union-attr]
            found.append([(c.function.name, json.loads(c.function.arguments)) for c in calls])  # type: ignore[union-attr]
    return found


def test_forced_calls_fit_their_schema(pair: Cluster) -> None:
    for calls in asyncio.run(_forced(pair.url)):
        ((name, arguments),) = calls
        assert name == "scale" and set(arguments) == {"kind", "count"}
        assert arguments["kind"] in ("prefill", "decode") and 1 <= arguments["count"] <= 9


async def _beyond_the_limits(url: str) -> str:
    """The error of an answer whose grammar grows too large, beside one that goes on."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        hostile = client.completions.create(
            model="demo", prompt="x", max_tokens=100, temperature=0,
            extra_body={"structured_outputs": {"regex": "(a{1000}){1000}"}},
        )  # fmt: skip
        plain = ask(client, "choice", temperature=0)
        error, other = await asyncio.gather(hostile, plain, return_exceptions=True)
        assert isinstance(error, BadRequestError), error
        assert not isinstance(other, BaseException), other
        return error.message


def test_a_grammar_beyond_its_limits_ends_alone(pair: Cluster) -> None:
    assert "cannot be followed any further" in asyncio.run(_beyond_the_limits(pair.url))
    pair.wait_until_clean()


def kill_the_busy_one(decoding: list[dict[str, Any]]) -> int:
    """Returns its process id."""
    busy = [r for r in decoding if metrics(r["host"], r["http_port"])["running"]]
    os.kill(busy[0]["pid"], signal.SIGKILL)
    return int(busy[0]["pid"])


def test_a_killed_decode_worker_changes_nothing(pair: Cluster) -> None:
    streamed, undisturbed, killed = asyncio.run(_killed_on_its_way(pair))
    assert streamed == undisturbed
    assert len(json.loads(streamed)) == 5
    survivors = [r for r in pair.workers() if r["pid"] != killed and r["http_port"]]
    deadline = time.monotonic() + 5
    while not all(is_clean(metrics(r["host"], r["http_port"])) for r in survivors):
        assert time.monotonic() < deadline, "blocks are held"
        time.sleep(0.02)
