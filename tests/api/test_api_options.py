"""Options of the router that change how it answers everybody."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from router_harness import BODY, CHAT, RouterHarness

from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings
from pdserve.protocol.errors import PdserveError
from pdserve.router.app import create_app

Start = Callable[..., RouterHarness]


def serving(start: Start, **options: Any) -> RouterHarness:
    harness = start(**options)
    harness.add(Role.PREFILL)
    harness.add(Role.DECODE)
    harness.until_connected()
    return harness


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_what_is_done_unless_a_request_says_otherwise(start: Start) -> None:
    harness = serving(
        start, return_tokens_as_token_ids=True, enable_force_include_usage=True,
        stream_interval=4, response_role="bot",
    )  # fmt: skip
    asked = BODY | {"logprobs": True, "stream": True, "max_tokens": 13}
    found = chunks(harness.client.post(CHAT, json=asked))
    assert all("usage" in chunk for chunk in found if chunk["choices"][1:] or not chunk["choices"])
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 13
    assert found[0]["choices"][0]["delta"]["role"] == "bot"
    texts = [c for chunk in found for c in chunk["choices"] if c["delta"].get("content")]
    sizes = [len(c["logprobs"]["content"]) for c in texts]
    assert sum(sizes) == 13 and all(size >= 4 for size in sizes[1:-1])
    token = texts[0]["logprobs"]["content"][0]["token"]
    assert token.startswith("token_id:")
    other = asked | {"return_tokens_as_token_ids": False, "stream_interval": 1}
    texts = [c for k in chunks(harness.client.post(CHAT, json=other)) for c in k["choices"]]
    scored = [one for c in texts if c["logprobs"] for one in c["logprobs"]["content"]]
    assert len(scored) == 13
    assert not any(one["token"].startswith("token_id:") for one in scored)
    whole = harness.client.post(CHAT, json=BODY).json()
    assert whole["choices"][0]["message"]["role"] == "bot" and whole["metrics"] is None
    begun = [*BODY["messages"], {"role": "assistant", "content": "I"}]
    more = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    found = chunks(harness.client.post(CHAT, json=more | {"stream": True}))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"


def test_times_of_each_request(start: Start) -> None:
    harness = serving(start, enable_per_request_metrics=True)
    whole = harness.client.post(CHAT, json=BODY).json()["metrics"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = chunks(harness.client.post(CHAT, json=BODY | options))[-1]["metrics"]
    for found in (whole, streamed):
        assert found["time_to_first_token_ms"] > 0 and found["queue_time_ms"] >= 0
        assert found["mean_itl_ms"] > 0 and found["generation_time_ms"] > found["mean_itl_ms"]
        assert found["speculative_decoding"] is None
    one = harness.client.post(CHAT, json=BODY | {"max_tokens": 1}).json()["metrics"]
    assert one["mean_itl_ms"] is None and one["tokens_per_second"] is None
    several = harness.client.post(CHAT, json=BODY | {"n": 2, "temperature": 1}).json()
    assert several["metrics"] is None


def test_a_silent_stream_says_that_it_lives(start: Start) -> None:
    """Also before its first token."""
    harness = serving(start, sse_keep_alive_interval=0.02)
    for worker in harness.workers:
        worker.go.clear()
        with harness.client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if text.count(": keep-alive\n\n") == 2:
                    harness.run(_go(worker))
                if text.endswith("data: [DONE]\n\n"):
                    break
        assert text.count(": keep-alive\n\n") >= 2
        assert text.startswith('data: {"id"') and '"role"' in text.partition("\n\n")[0]


async def _go(worker: Any) -> None:
    worker.go.set()


def test_pages_can_be_switched_off(start: Start) -> None:
    for options in ({}, {"enable_offline_docs": True}):
        harness = start(disable_fastapi_docs=True, **options)
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert harness.client.get(path).status_code == 404


def test_what_browsers_may_do(start: Start) -> None:
    harness = start(
        allowed_origins=("https://a",), allowed_methods=("GET",), allowed_headers=("x-a",),
        allow_credentials=True,
    )  # fmt: skip
    ask = {"origin": "https://a", "access-control-request-method": "GET"}
    answer = harness.client.options("/v1/models", headers=ask)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-max-age"] == "600"
    for change in (
        {"access-control-request-method": "POST"},
        {"access-control-request-headers": "x-b"},
        {"origin": "https://b"},
    ):
        assert harness.client.options("/v1/models", headers=ask | change).status_code == 400


class Layer:
    """Middleware, as its users write it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-layer", b"class")]
            await send(message)

        await self._app(scope, receive, marked)


async def layer(request: Any, call_next: Any) -> Any:
    if request.headers.get("x-break"):
        raise RuntimeError("a fault of the middleware")
    answer = await call_next(request)
    answer.headers["x-second-layer"] = "function"
    return answer


def test_middleware_of_the_operator(start: Start) -> None:
    here = Layer.__module__
    harness = start(middleware=(f"{here}.Layer", f"{here}.layer"), api_key=("k",))
    answer = harness.client.get("/version")
    assert answer.headers["x-layer"] == "class"
    assert answer.headers["x-second-layer"] == "function" and answer.headers["x-request-id"]
    broken = harness.client.get("/version", headers={"x-break": "1"})
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "InternalServerError"
    refused = harness.client.get("/v1/models", headers={"x-break": "1"})
    assert refused.status_code == 401 and "x-layer" not in refused.headers


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"middleware": ("nowhere.Layer",)}, "--middleware nowhere.Layer cannot be imported"),
        ({"middleware": ("json.decoder.NaN",)}, "must be an ASGI class or an async function"),
        ({"fingerprint_mode": "custom"}, "need each other"),
        ({"fingerprint_value": "x"}, "need each other"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PdserveError, match=sentence):
        create_app(RouterSettings(secret="x", **options))


def test_fingerprints(start: Start) -> None:
    for mode, value in (("hash", ""), ("custom", "mine"), ("none", "")):
        harness = serving(start, fingerprint_mode=mode, fingerprint_value=value)
        found = harness.client.post(CHAT, json=BODY).json()["system_fingerprint"]
        assert {"hash": len(found or "") == 8, "custom": found == "mine"}.get(mode, found is None)


def test_heads_of_requests_are_bounded(start: Start) -> None:
    harness = start(h11_max_incomplete_event_size=20_000, h11_max_header_count=30)
    address = ("127.0.0.1", int(harness.url.rpartition(":")[2]))
    begin, line = b"GET /version HTTP/1.1\r\nhost: x\r\n", b"x-%d: 1\r\n"
    heads = {
        "one long header": begin + b"x: " + b"a" * 500_000 + b"\r\n\r\n",
        "without an end": begin + b"x: " + b"a" * 500_000,
        "a long address": b"GET /" + b"a" * 500_000,
        "many headers": begin + b"".join(line % n for n in range(40)) + b"\r\n",
        "fewer": begin + b"".join(line % n for n in range(20)) + b"\r\n",
    }
    for name, head in heads.items():
        with socket.create_connection(address, timeout=10) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(head)
            answer = client.recv(2000)
        assert answer.startswith(b"HTTP/1.1 200" if name == "fewer" else b"HTTP/1.1 431"), name
