"""Running requests as the other routers of their cluster know them: two routers, one Redis."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_worker import FakeWorker
from router_harness import LONG, RouterHarness

from pdserve.cluster.explain import explain
from pdserve.cluster.records import Role
from pdserve.cluster.requests import RequestRecord, RequestRecords
from pdserve.cluster.status import status
from pdserve.router import admission

Start = Callable[..., RouterHarness]
ABORT = "/inference/v1/abort_requests"


class Asked(threading.Thread):
    """A stream of a router whose worker pauses after two tokens."""

    def __init__(self, harness: RouterHarness, request_id: str) -> None:
        super().__init__()
        self._harness, self._id = harness, request_id
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        headers = {"x-request-id": self._id}
        url = f"{self._harness.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG, headers=headers, timeout=20) as answer:
            self.lines += [line for line in answer.iter_lines() if line]


def of_two(start: Start) -> tuple[RouterHarness, RouterHarness]:
    """The first one's worker pauses; the second one knows it, too."""
    one = start(enable_scale_out=True)
    worker = one.add(Role.PREFILL, pause_at=None), one.add(Role.DECODE, pause_at=2)
    other = start(enable_scale_out=True, cluster=one.cluster)
    one.until_connected()
    other.until_connected(len(worker))
    return one, other


def found(harness: RouterHarness, answer_id: str) -> RequestRecord | None:
    async def find() -> RequestRecord | None:
        records = RequestRecords(harness.settings.redis, harness.cluster)
        try:
            return await records.find(answer_id)
        finally:
            await records.close()

    return harness.run(find())


def told(harness: RouterHarness, *what: str) -> list[str]:
    return [*what, "--redis", harness.settings.redis, "--cluster", harness.cluster]


def release(harness: RouterHarness) -> None:
    async def go() -> None:
        for worker in harness.workers:
            worker.pause_at = None
            worker.go.set()

    harness.run(go())


def test_any_router_ends_a_request_that_another_one_carries(start: Start) -> None:
    one, other = of_two(start)
    asked = Asked(one, "mine")
    one.wait(lambda: not one.workers[1].go.is_set(), "for a pause")
    one.wait(lambda: (found(other, "chatcmpl-mine") or _NONE).tokens == 3, "for a record")
    record = found(other, "chatcmpl-mine")
    assert record is not None and record.router == one.router.pool.name
    assert [holder.worker for holder in record.holders] == [one.workers[1].worker_id]
    assert round(record.deadline - record.received) == one.settings.request_timeout_s
    assert other.client.post(ABORT, json={"request_ids": ["chatcmpl-mine", "x"]}).status_code == 200
    asked.join(10)
    ends = [json.loads(line[6:])["choices"] for line in asked.lines if line != "data: [DONE]"]
    assert ends[-1][0]["finish_reason"] == "abort"
    release(one)
    one.until_idle()
    one.run(one.router.ledger.beat())
    assert found(other, "chatcmpl-mine") is None


def test_a_request_that_waits_for_its_turn_is_ended_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "WAITING_PER_WORKER", 1)
    one, other = of_two(start)
    prefill = one.workers[0]
    one.run(_hold(prefill))
    first = Asked(one, "first")
    one.wait(lambda: len(prefill.submits) == 1, "for the first one")
    second = Asked(one, "second")
    one.wait(lambda: found(other, "chatcmpl-second") is not None, "for a record")
    assert one.router.admission.in_line == 1
    assert other.client.post(ABORT, json={"request_ids": ["chatcmpl-second"]}).status_code == 200
    second.join(10)
    assert any('"finish_reason":"abort"' in line for line in second.lines)
    assert one.router.admission.in_line == 0 and len(prefill.submits) <= 2
    release(one)
    first.join(10)
    assert first.lines[-1] == "data: [DONE]"
    one.until_idle()


async def _hold(worker: FakeWorker) -> None:
    worker.go.clear()


def test_where_a_running_request_is(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = of_two(start)
    asked = Asked(one, "where")
    one.wait(lambda: (found(other, "chatcmpl-where") or _NONE).tokens == 3, "for a record")
    one.run(one.router.recorder.flush())
    decoder = one.workers[1]
    assert explain(told(other, "where")) == 0
    line = f"now: 3 tokens, decode on {decoder.worker_id} (epoch {decoder.epoch}); ends within "
    assert line in capsys.readouterr().out
    assert status(told(other)) == 0
    text = capsys.readouterr().out
    assert f"{one.router.pool.name}: 1 requests" in text
    assert f"{other.router.pool.name}: 0 requests" in text
    release(one)
    asked.join(10)
    one.until_idle()


def test_of_a_request_whose_router_died_only_its_story_is_left(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = start()
    one.add(Role.COLOCATED, pause_at=2)
    one.until_connected()
    asked = Asked(one, "left")
    one.wait(lambda: found(one, "chatcmpl-left") is not None, "for a record")
    one.wait(lambda: explain(told(one, "left", "--json")) == 0, "for a story")
    capsys.readouterr()
    ledger = one.router.ledger
    monkeypatch.setattr(type(ledger), "beat", _nothing)
    one.run(ledger._records.beat("other", []))
    one.run(ledger._records.beat(one.router.pool.name, [], 0.001))  # as if that had been its last
    one.wait(lambda: found(one, "chatcmpl-left") is None, "for the end of the lease")
    assert explain(told(one, "left")) == 0
    assert "no router carries it; it has just ended, or its router died" in capsys.readouterr().out
    release(one)
    asked.join(10)


def test_a_request_without_a_story(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    one = start()
    record = RequestRecord(
        id="cmpl-a", request_id="a", router="r", received=0.0, deadline=0.0, prompt_tokens=3,
        tokens=4, holders=[],
    )  # fmt: skip
    one.run(one.router.ledger._records.beat("r", [record]))
    assert explain(told(one, "a")) == 0
    text = capsys.readouterr().out
    assert "cmpl-a: running" in text and "now: 4 tokens, on no worker" in text


def test_aborts_without_redis(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one = start(enable_scale_out=True)
    one.add(Role.COLOCATED, pause_at=2)
    one.until_connected()
    asked = Asked(one, "mine")
    one.wait(lambda: not one.workers[0].go.is_set(), "for a pause")
    away = RequestRecords("redis://127.0.0.1:1", one.cluster)
    monkeypatch.setattr(one.router.ledger, "_records", away)
    answer = one.client.post(ABORT, json={"request_ids": ["chatcmpl-mine", "foreign"]})
    assert answer.status_code == 503 and "others could not be told" in answer.text
    asked.join(10)
    assert any('"finish_reason":"abort"' in line for line in asked.lines)
    assert one.client.post(ABORT, json={"request_ids": []}).status_code == 200
    release(one)
    one.until_idle()


async def _nothing(self: Any) -> None:
    return None


_NONE = RequestRecord(
    id="", request_id="", router="", received=0.0, deadline=0.0, prompt_tokens=0, tokens=-1,
    holders=[],
)  # fmt: skip
