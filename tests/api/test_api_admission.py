"""Who is refused, who waits in which order: a real router, a real Redis, fake workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fake_worker import FakeWorker
from router_harness import RouterHarness

from pdserve.cluster.records import Role
from pdserve.protocol.messages import LifeEvent
from pdserve.router import admission
from pdserve.router.predict import LegFacts

Start = Callable[..., RouterHarness]
URL = "/v1/completions"
BODY = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}


def one(start: Start, **settings: Any) -> tuple[RouterHarness, FakeWorker]:
    """A router whose worker brings no tokens until told to."""
    harness = start(**settings)
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    worker.go.clear()
    return harness, worker


async def _go(worker: FakeWorker) -> None:
    worker.go.set()


@contextmanager
def asking(harness: RouterHarness, headers: dict[str, str], **body: Any) -> Iterator[list[int]]:
    """A request in a thread; its status is in the list when the context has been left."""
    statuses: list[int] = []

    def run() -> None:
        answer = httpx.post(harness.url + URL, json=BODY | body, headers=headers, timeout=20)
        statuses.append(answer.status_code)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield statuses
    finally:
        thread.join(20)


def learn(harness: RouterHarness, seconds_per_token: float) -> None:
    """Teach the router how long a prefill takes."""
    for number in range(40):
        length = 10 + number * 5
        events = [("scheduled", 0.0), ("first_token", length * seconds_per_token)]
        facts = LegFacts(
            worker_id="x", length=length, cached=0, drawn=1, requests=0,
            events=tuple(LifeEvent(name, at) for name, at in events),
        )  # fmt: skip
        harness.router.dispatcher.predictor.learn(facts)


def test_too_many_wait_for_their_first_token(start: Start) -> None:
    harness, worker = one(start, max_waiting=2)
    with asking(harness, {}), asking(harness, {}):
        harness.run(worker.until(lambda: len(worker.submits) == 2))
        refused = harness.client.post(URL, json=BODY)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert error["type"] == "RateLimitError" and "--max-waiting" in error["message"]
        message = {"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
        anthropic = harness.client.post("/v1/messages", json=message)
        assert anthropic.status_code == 429 and anthropic.headers["retry-after"]
        assert anthropic.json()["error"]["type"] == "rate_limit_error"
        assert len(worker.submits) == 2
        harness.run(_go(worker))
    harness.until_idle()
    assert harness.client.post(URL, json=BODY).status_code == 200
    metrics = harness.client.get("/metrics").text
    assert 'vllm:admission_rejections_total{model_name="demo",reason="max_waiting"} 2.0' in metrics


def test_first_tokens_that_would_come_too_late(start: Start) -> None:
    harness, worker = one(start, max_ttft_ms=5000)
    harness.run(_go(worker))
    learn(harness, 0.1)
    assert harness.client.post(URL, json=BODY | {"prompt": [5] * 20}).status_code == 200
    late = harness.client.post(URL, json=BODY | {"prompt": [5] * 80})
    assert late.status_code == 429 and int(late.headers["retry-after"]) in (3, 4)
    assert "--max-ttft-ms" in late.json()["error"]["message"]
    headers = {"x-slo-ttft-ms": "1500"}
    picky = harness.client.post(URL, json=BODY | {"prompt": [5] * 20}, headers=headers)
    assert picky.status_code == 429 and "x-slo-ttft-ms" in picky.json()["error"]["message"]
    assert len(worker.submits) == 1


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-itl-ms"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "3600001"])
def test_targets_must_be_durations(start: Start, name: str, value: str) -> None:
    harness = start()
    harness.add(Role.COLOCATED)
    harness.until_connected()
    refused = harness.client.post(URL, json=BODY, headers={name: value})
    assert refused.status_code == 400 and name in refused.json()["error"]["message"]


def test_the_line_is_fair_among_tenants_and_by_priority(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "WAITING_PER_WORKER", 1)
    harness, worker = one(start)
    door = harness.router.admission
    with asking(harness, {}) as first:
        harness.run(worker.until(lambda: len(worker.submits) == 1))
        wanted = [("a", 0, 2000), ("a", 0, 2001), ("a", -1, 2002), ("b", 5, 2003)]
        with ExitStack() as stack:
            all_statuses = []
            for count, (tenant, priority, length) in enumerate(wanted, 1):
                headers = {"x-tenant-id": tenant}
                context = asking(harness, headers, prompt=[5] * length, priority=priority)
                all_statuses.append(stack.enter_context(context))
                harness.wait(lambda count=count: door.in_line == count)
            assert len(worker.submits) == 1
            harness.run(_go(worker))
    assert all_statuses == [[200]] * 4
    assert first == [200]
    order = [len(submit.prompt_token_ids) for submit in worker.submits[1:]]
    assert order == [2002, 2003, 2000, 2001]
    assert [submit.priority for submit in worker.submits[1:3]] == [-1, 5]
    harness.until_idle()
    assert door.in_line == 0


def test_long_prompts_are_let_in_by_their_tokens(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "TOKENS_PER_WORKER", 1000)
    harness, worker = one(start)
    door = harness.router.admission
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(asking(harness, {}, prompt=[5] * 900))
        stack.callback(lambda: harness.run(_go(worker)))
        harness.wait(lambda: len(worker.submits) + door.in_line == 5)
        assert len(worker.submits) == 2  # the first one left room
    harness.until_idle()
    assert len(worker.submits) == 5


def test_who_leaves_the_line_is_not_served(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "WAITING_PER_WORKER", 1)
    harness, worker = one(start)
    door = harness.router.admission
    with asking(harness, {}):
        harness.run(worker.until(lambda: len(worker.submits) == 1))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(harness.url + URL, json=BODY, timeout=0.3)
        harness.wait(lambda: door.in_line == 0)
        harness.run(_go(worker))
    harness.until_idle()
    assert len(worker.submits) == 1
    assert harness.client.post(URL, json=BODY).status_code == 200


def test_time_runs_out_in_line_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "WAITING_PER_WORKER", 1)
    harness, worker = one(start, request_timeout_s=1.0)
    with asking(harness, {}) as first:
        harness.run(worker.until(lambda: len(worker.submits) == 1))
        late = harness.client.post(URL, json=BODY)
        assert late.status_code in (200, 504)  # the first one's own time may run out before
    assert first == [504]
    harness.run(_go(worker))
    harness.until_idle()


def test_requests_wait_while_tokens_would_come_too_slowly(start: Start) -> None:
    harness, worker = one(start, max_itl_ms=20)
    for number in range(60):  # 10 ms and 1 ms for each request there
        requests = number % 20
        events = [("first_token", 0.0), ("finished", 10 * (0.010 + 0.001 * requests))]
        facts = LegFacts(
            worker_id=worker.worker_id, length=3, cached=0, drawn=11, requests=requests,
            events=tuple(LifeEvent(name, at) for name, at in events),
        )  # fmt: skip
        harness.router.dispatcher.predictor.learn(facts)
    door = harness.router.admission
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(asking(harness, {}))
        stack.callback(lambda: harness.run(_go(worker)))
        harness.wait(lambda: len(worker.submits) >= 8)
        harness.wait(lambda: len(worker.submits) + door.in_line == 16)
        assert len(worker.submits) <= 11
    harness.until_idle()
    assert len(worker.submits) == 16
