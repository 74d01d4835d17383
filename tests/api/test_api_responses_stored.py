"""Responses that are stored: read, continued, made in the background, on any router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from response_events import events
from router_harness import TEXT, RedisProcess, RouterHarness

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.records import Role
from pdserve.cluster.responses import ResponseStore, StoredResponse
from pdserve.protocol.errors import ErrorCode, WorkerError

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "demo", "input": "Hi"}
LATER: dict[str, Any] = {**BODY, "background": True}
OPEN = ("queued", "in_progress")

Start = Callable[..., RouterHarness]


@pytest.fixture
def pair(redis_url: str) -> Iterator[tuple[RouterHarness, RouterHarness]]:
    """Two routers of one cluster with one worker."""
    with ExitStack() as stack:
        first = stack.enter_context(RouterHarness(redis_url))
        second = RouterHarness(redis_url)
        second.cluster = first.cluster
        second.settings = replace(second.settings, cluster=first.cluster)
        stack.enter_context(second)
        first.add(Role.COLOCATED)
        for router in (first, second):
            router.until_connected(1)
        yield first, second
        first.until_idle()


def sdk(harness: RouterHarness) -> OpenAI:
    return OpenAI(base_url=f"{harness.url}/v1", api_key="x", max_retries=0, timeout=10)


def until(harness: RouterHarness, response_id: str, statuses: tuple[str, ...]) -> dict[str, Any]:
    """Poll for a status as clients do."""
    deadline = time.monotonic() + 10
    while True:
        found: dict[str, Any] = harness.client.get(f"{PATH}/{response_id}").json()
        if found["status"] in statuses:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def paused(harness: RouterHarness, at: int = 3) -> None:
    """The worker stops at its third token, until `go_on`."""
    harness.workers[0].pause_at = at


def go_on(harness: RouterHarness) -> None:
    worker = harness.workers[0]

    async def go() -> None:
        worker.pause_at = None
        worker.go.set()

    harness.run(go())


def prompt_of(harness: RouterHarness) -> str:
    ids = harness.workers[0].submits[-1].prompt_token_ids
    return harness.router.model.tokenizer.core.decode(ids, skip_special_tokens=False)


def test_what_one_router_made_another_reads(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    with sdk(first) as one, sdk(second) as other:
        made = one.responses.create(**BODY, instructions="Be brief.")
        assert other.responses.retrieve(made.id).to_dict() == made.to_dict()
        with other.responses.stream(**BODY) as stream:
            streamed = stream.get_final_response()
        assert one.responses.retrieve(streamed.id).output_text == TEXT
        (item,) = other.responses.input_items.list(made.id).data
        assert item.type == "message" and item.role == "user" and item.id
        after = other.responses.create(
            model="demo", input="And?", previous_response_id=made.id, store=False
        )
        assert after.previous_response_id == made.id
        text = prompt_of(first)
        assert "Hi" in text and TEXT in text and "And?" in text and "Be brief." not in text
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(after.id)
        other.responses.delete(made.id)
        for ask in (one.responses.retrieve, one.responses.delete, one.responses.cancel):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(made.id)  # type: ignore[operator]
        assert caught.value.param == "response_id"
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError, match="nothing"):
            one.responses.create(**BODY, previous_response_id="nothing")


def test_a_chain_of_three(harness: RouterHarness, client: OpenAI) -> None:
    last: Any = None
    for word in ("one", "two", "three"):
        last = client.responses.create(
            model="demo", input=f"say {word}", previous_response_id=last and last.id
        )
    text = prompt_of(harness)
    assert [text.count(f"say {word}") for word in ("one", "two", "three")] == [1, 1, 1]
    assert text.count(TEXT) == 2
    count = client.responses.input_tokens.count(
        model="demo", input="x", previous_response_id=last.id
    )
    assert count.input_tokens > len(harness.workers[0].submits[-1].prompt_token_ids)


def test_pages_of_input_items(harness: RouterHarness, client: OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"{n}", "id": f"msg_{n}"} for n in range(5)]
    made = client.responses.create(model="demo", input=items)
    listed = list(client.responses.input_items.list(made.id, limit=2))
    assert [item.id for item in listed] == [f"msg_{n}" for n in (4, 3, 2, 1, 0)]
    page = harness.client.get(f"{PATH}/{made.id}/input_items?order=asc&after=msg_3").json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_4", "msg_4", False)
    for query in ("limit=0", "order=up", "after=x"):
        answer = harness.client.get(f"{PATH}/{made.id}/input_items?{query}")
        assert answer.status_code == 400 and query.split("=")[0] in answer.json()["error"]["param"]


def test_in_the_background(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    paused(first)
    with sdk(first) as one, sdk(second) as other:
        queued = one.responses.create(**BODY, background=True)
        assert (queued.status, queued.output, queued.usage) == ("queued", [], None)
        until(second, queued.id, ("in_progress",))
        with pytest.raises(openai.BadRequestError, match="in_progress"):
            other.responses.create(**BODY, previous_response_id=queued.id)
        with pytest.raises(openai.BadRequestError, match="background and stream"):
            other.responses.retrieve(queued.id, stream=True)
        go_on(first)
        until(second, queued.id, ("completed",))
        done = other.responses.retrieve(queued.id)
        assert done.output_text == TEXT and done.usage and done.background
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            other.responses.cancel(queued.id)
        made = one.responses.create(**BODY)
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            other.responses.cancel(made.id)


def test_cancelled_from_another_router(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    paused(first)
    with sdk(first) as one, sdk(second) as other:
        queued = one.responses.create(**BODY, background=True)
        first.wait(lambda: first.router.dispatcher.in_flight == 1)
        assert other.responses.cancel(queued.id).status == "cancelled"
        began = time.monotonic()
        first.wait(lambda: first.router.dispatcher.in_flight == 0)
        assert time.monotonic() - began < 5
        go_on(first)
        assert one.responses.retrieve(queued.id).status == "cancelled"
        assert other.responses.cancel(queued.id).status == "cancelled"
        one.responses.delete(queued.id)


def test_deleted_while_it_is_made(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    paused(first)
    made = first.client.post(PATH, json=LATER).json()
    first.wait(lambda: first.router.dispatcher.in_flight == 1)
    assert second.client.delete(f"{PATH}/{made['id']}").json()["deleted"]
    first.wait(lambda: first.router.dispatcher.in_flight == 0)
    go_on(first)
    assert second.client.get(f"{PATH}/{made['id']}").status_code == 404


def test_a_background_stream_is_read_again(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    paused(first)
    seen = []
    with first.client.stream("POST", PATH, json={**LATER, "stream": True}) as answer:
        for line in answer.iter_lines():
            seen.append(line)
            if "response.output_text.delta" in line:
                break  # the client leaves; the response goes on
    (_, created), *_ = events("\n".join(seen[:2]))
    response_id = created["response"]["id"]
    go_on(first)
    with second.client.stream("GET", f"{PATH}/{response_id}?stream=true") as answer:
        whole = events(answer.read().decode())
    assert whole[0][1]["sequence_number"] == 0 and whole[-1][0] == "response.completed"
    assert whole[-1][1]["response"]["output"][0]["content"][0]["text"] == TEXT
    with sdk(second) as other:
        rest = list(other.responses.retrieve(response_id, stream=True, starting_after=3))
        assert [event.sequence_number for event in rest] == list(range(4, len(whole)))
        assert other.responses.retrieve(response_id).output_text == TEXT
        assert list(other.responses.retrieve(response_id, stream=True, starting_after=999)) == []
    bad = second.client.get(f"{PATH}/{response_id}?stream=true&starting_after=-5")
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "query.starting_after"


def test_a_cancelled_stream_ends(pair: tuple[RouterHarness, RouterHarness]) -> None:
    first, second = pair
    paused(first)
    with first.client.stream("POST", PATH, json={**LATER, "stream": True}) as answer:
        lines = answer.iter_lines()
        seen = [next(lines), next(lines), next(lines)]
        response_id = events("\n".join(seen))[0][1]["response"]["id"]
        assert second.client.post(f"{PATH}/{response_id}/cancel").status_code == 200
        found = events("\n".join([*seen, *lines]))
    assert found[-1][0] == "response.completed"
    assert found[-1][1]["response"]["status"] == "cancelled"
    first.wait(lambda: first.router.dispatcher.in_flight == 0)
    go_on(first)


def test_a_stream_whose_response_is_deleted_ends(
    pair: tuple[RouterHarness, RouterHarness],
) -> None:
    first, second = pair
    paused(first)
    with first.client.stream("POST", PATH, json={**LATER, "stream": True}) as answer:
        lines = answer.iter_lines()
        seen = [next(lines), next(lines), next(lines)]
        response_id = events("\n".join(seen))[0][1]["response"]["id"]
        assert second.client.delete(f"{PATH}/{response_id}").status_code == 200
        name, data = events("\n".join([*seen, *lines]))[-1]
    assert name == "error" and response_id in data["message"]
    first.wait(lambda: first.router.dispatcher.in_flight == 0)
    go_on(first)


def test_events_wait_while_redis_is_deaf(
    pair: tuple[RouterHarness, RouterHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = pair
    deaf, asked = 2, 0
    renew = ResponseStore.renew

    async def after_a_while(self: ResponseStore, *given: Any) -> bool:
        """The first times it is done, but the answer is lost."""
        nonlocal asked
        asked += 1
        done = await renew(self, *given)
        if asked <= deaf:
            raise RedisUnavailable("no answer")
        return done

    monkeypatch.setattr(ResponseStore, "renew", after_a_while)
    paused(first)
    with first.client.stream("POST", PATH, json={**LATER, "stream": True}) as answer:
        first.wait(lambda: asked > deaf)
        go_on(first)
        found = events(answer.read().decode())
    assert found[-1][0] == "response.completed"
    pieces = [data["delta"] for name, data in found if name == "response.output_text.delta"]
    assert "".join(pieces) == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_response_that_fails(start: Start, stream: bool) -> None:
    harness = start()
    harness.add(Role.PREFILL)
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    decode.refuse = [WorkerError(code=ErrorCode.INTERNAL, message="The step failed.")]
    answer = harness.client.post(PATH, json={**LATER, "stream": stream})
    if stream:
        name, data = events(answer.text)[-1]
        assert name == "response.failed"
        failed = data["response"]
    else:
        failed = until(harness, answer.json()["id"], ("failed",))
    assert failed["error"] == {"code": "server_error", "message": "The step failed."}


def test_a_router_that_stops_says_so(redis_url: str) -> None:
    with RouterHarness(redis_url) as harness:
        store = ResponseStore(redis_url, harness.cluster, ttl_s=60)
        harness.add(Role.COLOCATED)
        harness.until_connected()
        paused(harness)
        made = harness.client.post(PATH, json=LATER).json()
        harness.wait(lambda: harness.router.dispatcher.in_flight == 1)
        harness.run(harness.router.responses.close())

    async def look() -> StoredResponse | None:
        try:
            return await store.find(made["id"])
        finally:
            await store.close()

    found = asyncio.run(look())
    assert found is not None and found.body["status"] == "failed"
    assert found.body["error"]["message"] == "The router was stopped."


def test_a_stored_id_is_not_taken_twice(harness: RouterHarness) -> None:
    for body in (BODY, LATER):
        named = {**body, "request_id": f"twice_{harness.cluster}_{len(body)}"}
        assert harness.client.post(PATH, json=named).status_code == 200
        answer = harness.client.post(PATH, json=named)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "request_id"
        until(harness, named["request_id"], ("completed",))


def test_without_a_store(start: Start) -> None:
    harness = start(responses_ttl=0)
    harness.add(Role.COLOCATED)
    harness.until_connected()
    made = harness.client.post(PATH, json=BODY).json()
    assert harness.client.get(f"{PATH}/{made['id']}").status_code == 404
    again = {**BODY, "previous_response_id": made["id"]}
    assert harness.client.post(PATH, json=again).status_code == 404
    answer = harness.client.post(PATH, json=LATER)
    assert answer.status_code == 400 and "--responses-ttl" in answer.json()["error"]["message"]


def test_without_redis() -> None:
    with RedisProcess() as redis, RouterHarness(redis.url) as harness:
        harness.add(Role.COLOCATED)
        harness.until_connected()
        made = harness.client.post(PATH, json=BODY).json()
        redis.stop()
        for body in ({}, {"store": False}, {"stream": True}):
            answer = harness.client.post(PATH, json={**BODY, **body})
            assert answer.status_code == 200, answer.text
        asks: list[Callable[[], httpx.Response]] = [
            lambda: harness.client.get(f"{PATH}/{made['id']}"),
            lambda: harness.client.delete(f"{PATH}/{made['id']}"),
            lambda: harness.client.post(f"{PATH}/{made['id']}/cancel"),
            lambda: harness.client.post(PATH, json=LATER),
            lambda: harness.client.post(PATH, json={**BODY, "store": True}),
            lambda: harness.client.post(PATH, json={**BODY, "previous_response_id": made["id"]}),
        ]
        for ask in asks:
            answer = ask()
            assert answer.status_code == 503 and "Redis" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "1"
