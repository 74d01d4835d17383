"""`pdserve explain` and its header: a real router, a real Redis, fake workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from redis import Redis
from router_harness import RouterHarness

from pdserve.cluster import explain as explain_module
from pdserve.cluster import journal as journal_module
from pdserve.cluster.explain import explain
from pdserve.cluster.journal import Journal, Note
from pdserve.cluster.records import Role
from pdserve.protocol.errors import ErrorCode, WorkerError

Start = Callable[..., RouterHarness]
BODY = {"model": "demo", "prompt": [5, 6, 7] * 30, "max_tokens": 6, "ignore_eos": True}


def pair(start: Start, **settings: Any) -> RouterHarness:
    harness = start(**settings)
    for role in (Role.PREFILL, Role.DECODE):
        harness.add(role)
    harness.until_connected()
    return harness


def ask(harness: RouterHarness, headers: dict[str, str] | None = None, **body: Any) -> Any:
    answer = harness.client.post("/v1/completions", json=BODY | body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def told(harness: RouterHarness, name: str, *more: str) -> int:
    harness.run(harness.router.recorder.flush())
    where = ["--redis", harness.settings.redis, "--cluster", harness.cluster]
    return explain([name, *where, *more])


def test_a_finished_request_by_both_of_its_ids(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = pair(start)
    answer = ask(harness)
    texts = []
    for name in (answer.json()["id"], answer.headers["x-request-id"]):
        assert told(harness, name) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    text = texts[0]
    assert f"{answer.json()['id']}: finished after" in text and "90 prompt tokens" in text
    assert "1. prefill on prefill-" in text and "2. decode on decode-" in text
    assert "answer 0: 6 tokens, length" in text
    for phase in ("read, tokenize", "choose", "queue", "prefill", "decode"):
        assert any(phase in line and "│" in line for line in text.splitlines()), phase


def test_scores_of_all_candidates_and_why(start: Start) -> None:
    harness = start()
    for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.COLOCATED):
        harness.add(role)
    harness.until_connected()
    answer = ask(harness, {"x-pdserve-explain": "1"}).headers["x-pdserve-explain"]
    choice = json.loads(answer)[0]
    assert (choice["among"], choice["how"], choice["tokens"]) == (3, "redis", 90)
    assert choice["kind"] in ("prefill", "full") and "handed over: costs" in choice["why"]
    assert choice["cost"] >= 90 and choice["cached_tokens"] == 0


def test_the_header_comes_with_streams_and_only_if_asked_for(start: Start) -> None:
    harness = pair(start)
    assert "x-pdserve-explain" not in ask(harness).headers
    headers = ask(harness, {"x-pdserve-explain": "1"}, stream=True).headers
    kinds = [leg["kind"] for leg in json.loads(headers["x-pdserve-explain"])]
    assert kinds[0] == "prefill"


def test_what_went_wrong_on_the_way(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    harness = start()
    workers = [harness.add(Role.COLOCATED) for _ in range(2)]
    harness.until_connected()
    for worker in workers:
        worker.refuse.append(WorkerError(code=ErrorCode.KV_LOST, message="The cat sat on it."))
    answer = ask(harness)
    assert told(harness, answer.json()["id"]) == 0
    text = capsys.readouterr().out
    assert "went wrong: kv_lost: The cat sat on it." in text
    assert "moved on colocated-" in text


def test_a_running_request(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    harness = start()
    worker = harness.add(Role.COLOCATED, pause_at=2)
    harness.until_connected()
    url = f"{harness.url}/v1/completions"
    headers = {"x-request-id": "run-1"}
    with httpx.stream("POST", url, json=BODY | {"stream": True}, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        harness.wait(lambda: harness.run(_find(harness, "cmpl-run-1")) is not None, "for a record")
        assert told(harness, "run-1", "--json") == 0
        record = json.loads(capsys.readouterr().out)
        assert record["state"] == "running" and record["answers"][0]["legs"][0]["kind"] == "full"
        worker.pause_at = None
        harness.run(_go(worker))
        list(lines)
    harness.until_idle()
    assert told(harness, "run-1") == 0
    assert "finished" in capsys.readouterr().out


async def _go(worker: Any) -> None:
    worker.go.set()


async def _find(harness: RouterHarness, name: str) -> object:
    journal = Journal(harness.settings.redis, harness.cluster)
    try:
        return await journal.find(name)
    finally:
        await journal.close()


def test_unknown_ids_and_no_ids(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    harness = start()
    assert told(harness, "chatcmpl-nobody") == 2
    assert "No request 'chatcmpl-nobody' is known" in capsys.readouterr().err
    assert explain(["--redis", harness.settings.redis]) == 2
    assert "Which request?" in capsys.readouterr().err


def test_without_redis_records_are_dropped_and_counted(start: Start) -> None:
    harness = pair(start)
    recorder = harness.router.recorder
    ask(harness)
    harness.run(recorder.flush())
    harness.run(recorder._journal.close())
    recorder._journal = Journal("redis://127.0.0.1:1", harness.cluster)
    ask(harness)
    harness.run(recorder.flush())
    assert "pdserve:explain_dropped_total 1.0" in harness.client.get("/metrics").text


def test_records_expire_and_are_bounded_in_number(redis_url: str) -> None:
    import asyncio

    async def write() -> list[object]:
        journal = Journal(redis_url, "few", keep=4)
        for number in range(6):
            text = b'{"id":"a%d","request_id":"r","router":"x","state":"finished",' % number
            text += b'"received":0,"elapsed_s":1,"tokenized_s":0}'
            for _ in range(2):  # the second one replaces the first
                await journal.write([Note((f"a{number}", f"r{number}"), text)])
        found = [await journal.find(f"{kind}{n}") for kind in "ar" for n in range(6)]
        await journal.close()
        return found

    found = [one is not None for one in asyncio.run(write())]
    assert found == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    client = Redis.from_url(redis_url)
    for key in client.scan_iter("{few}:*"):
        assert 0 < int(client.ttl(key)) <= journal_module.KEEP_S  # type: ignore[arg-type]
    client.close()


def test_nothing_of_an_id_steers_the_terminal() -> None:
    assert explain_module._printable("a\x1b[2Jb") == "a?[2Jb"
