"""Workers and clients that leave, at every stage; nothing hangs and nothing is left behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_worker import FakeWorker
from router_harness import BODY, CHAT, LONG, TEXT, RouterHarness, asking, hold

from pdserve.cluster.records import Role
from pdserve.protocol.errors import ErrorCode, WorkerError

Start = Callable[..., RouterHarness]


@pytest.fixture
def cluster(start: Start) -> Callable[..., tuple[RouterHarness, list[FakeWorker]]]:
    """`cluster("ppd")`: a router with two prefill workers and one decode worker."""

    def make(roles: str, **settings: Any) -> tuple[RouterHarness, list[FakeWorker]]:
        harness = start(**settings)
        known = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}
        workers = [harness.add(known[role]) for role in roles]
        harness.until_connected()
        return harness, workers

    return make


Cluster = Callable[..., tuple[RouterHarness, list[FakeWorker]]]


def frames(text: str) -> list[Any]:
    """The JSON of each server-sent event; [DONE] must be the last."""
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in event["choices"]
    )


def one_dies(at: int, workers: list[FakeWorker]) -> None:
    """The first of them that has brought `at` tokens for a request dies; the others live on."""

    def spare() -> None:
        for worker in workers:
            worker.die_at = None

    for worker in workers:
        worker.die_at, worker.on_death = at, spare


# clients that leave


def test_client_gone_during_prefill(cluster: Cluster) -> None:
    harness, (prefill, decode) = cluster("pd")
    hold(prefill)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(harness.url + CHAT, json=BODY, timeout=0.3, trust_env=False)
    harness.run(prefill.until(lambda: len(prefill.aborts) == 1))
    assert prefill.aborts == [prefill.submits[0].request_id]
    assert not decode.submits and not decode.aborts
    harness.until_idle()


def test_client_gone_during_transfer_is_told_to_both(cluster: Cluster) -> None:
    """The decode worker has brought no token yet: its blocks may still lie in the outbox."""
    harness, (prefill, decode) = cluster("pd")
    hold(decode)
    with harness.client.stream("POST", CHAT, json=LONG) as answer:
        assert next(answer.iter_lines()).startswith("data:")
        harness.run(decode.until(lambda: len(decode.submits) == 1))
    for worker in (prefill, decode):
        harness.run(worker.until(lambda worker=worker: len(worker.aborts) == 1))
    assert prefill.aborts == decode.aborts == [decode.submits[0].request_id]
    harness.until_idle()


@pytest.mark.parametrize("roles", ["pd", "c"])
def test_client_gone_mid_stream(cluster: Cluster, roles: str) -> None:
    harness, workers = cluster(roles)
    workers[-1].step_s = 0.005
    with harness.client.stream("POST", CHAT, json=LONG) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
    harness.run(workers[-1].until(lambda: len(workers[-1].aborts) == 1))
    harness.until_idle()
    if roles == "pd":
        assert not workers[0].aborts, "its blocks had been fetched long ago"


def test_client_gone_ends_all_answers(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c")
    worker.step_s = 0.005
    with harness.client.stream("POST", CHAT, json=LONG | {"n": 3, "temperature": 1}) as answer:
        next(answer.iter_lines())
    harness.run(worker.until(lambda: len(worker.aborts) == 3))
    harness.until_idle()


def test_a_stop_string_is_told_to_the_worker(cluster: Cluster) -> None:
    harness, (_, decode) = cluster("pd")
    answer = harness.client.post(CHAT, json=LONG | {"stop": "reads", "stream": False})
    assert answer.json()["choices"][0]["message"]["content"] == TEXT[: TEXT.index("reads")]
    harness.run(decode.until(lambda: len(decode.aborts) == 1))
    harness.until_idle()


def test_a_connection_is_used_again_after_a_stream_was_cut(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c")
    for _ in range(3):
        with harness.client.stream("POST", CHAT, json=LONG) as answer:
            next(answer.iter_lines())
        assert harness.client.post(CHAT, json=BODY).status_code == 200
    harness.until_idle()
    assert len(worker.aborts) == 3


# workers that die


def test_prefill_worker_dies_before_its_answer(cluster: Cluster) -> None:
    harness, (first, second, _) = cluster("ppd")
    one_dies(0, [first, second])
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert first.dead != second.dead
    assert len(first.submits) + len(second.submits) == 2


@pytest.mark.parametrize("roles", ["pdd", "pdc", "cc"])
def test_decode_worker_dies_mid_stream(cluster: Cluster, roles: str) -> None:
    """The client sees nothing: the same text, one role chunk, one finish, the same usage."""
    harness, workers = cluster(roles)
    one_dies(7, [worker for worker in workers if worker.role is not Role.PREFILL])
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}, "seed": 3}
    events = frames(harness.client.post(CHAT, json=body).text)
    assert sum(worker.dead for worker in workers) == 1
    assert text_of(events) == TEXT
    assert (
        events[-1]["usage"]["completion_tokens"]
        == len(harness.router.model.tokenizer.encode(TEXT, False)) + 1
    )
    roles_sent = [c for e in events for c in e["choices"] if c["delta"].get("role")]
    assert len(roles_sent) == 1
    moved = [s for w in workers if not w.dead for s in w.submits if s.output_token_ids][-1]
    original = next(s for w in workers for s in w.submits if not s.output_token_ids)
    assert len(moved.output_token_ids) >= 7 and moved.ticket is None
    assert moved.prompt_token_ids == original.prompt_token_ids
    assert moved.sampling == original.sampling and moved.request_id != original.request_id


def test_decode_worker_dies_before_its_first_token(cluster: Cluster) -> None:
    """The first token is out; the blocks in the outbox are given up at once."""
    harness, (prefill, first, second) = cluster("pdd")
    for worker in (first, second):
        hold(worker)
    with asking(harness, BODY) as found:
        harness.wait(lambda: bool(first.submits or second.submits))
        dying, other = (first, second) if first.submits else (second, first)
        assert dying.submits[0].ticket is not None
        harness.run(dying.die())
        harness.run(prefill.until(lambda: len(prefill.aborts) == 1))
        harness.run(other.until(lambda: len(other.submits) == 1))
        harness.run(_go(other))
    assert found[0].json()["choices"][0]["message"]["content"] == TEXT
    assert len(other.submits[0].output_token_ids) == 1 and len(prefill.submits) == 1


async def _go(worker: FakeWorker) -> None:
    worker.go.set()


def test_the_last_worker_dies_and_another_comes(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c")
    worker.die_at = 5
    with asking(harness, BODY | {"stream": True}) as found:
        harness.wait(lambda: worker.dead)
        harness.add(Role.COLOCATED)
    assert text_of(frames(found[0].text)) == TEXT


def test_nobody_comes(cluster: Cluster) -> None:
    """Before the first token an ordinary 503, after it an error in the stream; never a hang."""
    for die_at in (0, 5):
        harness, (worker,) = cluster("c")
        harness.router.dispatcher.waiting.patience_s = 0.2
        worker.die_at = die_at
        answer = harness.client.post(CHAT, json=BODY | {"stream": True})
        if die_at == 0:
            assert answer.status_code == 503 and answer.headers["retry-after"]
            error = answer.json()["error"]
        else:
            assert answer.status_code == 200
            events = frames(answer.text)
            assert text_of(events[:-1]) and TEXT.startswith(text_of(events[:-1]))
            error = events[-1]["error"]
        assert error["code"] == 503 and "No workers can serve requests" in error["message"]


def test_workers_that_die_again_and_again_are_not_an_endless_story(cluster: Cluster) -> None:
    harness, workers = cluster("cccccc")
    for worker in workers:
        worker.die_at = 0
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.status_code == 503 and "lost" in answer.json()["error"]["message"]
    assert sum(worker.dead for worker in workers) == 5


def test_a_worker_that_restarts_is_another_one(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c")
    harness.run(worker.die())
    harness.until_connected(0)
    again = harness.add(Role.COLOCATED, worker_id=worker.worker_id)
    assert again.epoch > worker.epoch
    harness.until_connected()
    assert harness.client.post(CHAT, json=BODY).status_code == 200
    assert again.submits[0].epoch == again.epoch


# workers that refuse


@pytest.mark.parametrize(
    "code", [ErrorCode.KV_LOST, ErrorCode.DRAINING, ErrorCode.STALE_EPOCH, ErrorCode.WORKER_LOST]
)
def test_a_refusal_to_decode_is_not_the_clients_business(cluster: Cluster, code: ErrorCode) -> None:
    harness, (prefill, first, second) = cluster("pdd")
    for worker in (first, second):
        worker.refuse = [WorkerError(code=code, message="no")]
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert prefill.aborts, "the ticket is of no use any more"
    sent = [submit for worker in (first, second) for submit in worker.submits]
    assert len({submit.request_id for submit in sent}) == len(sent)


def test_an_overloaded_prefill_worker_is_passed_over(cluster: Cluster) -> None:
    harness, (first, second, _) = cluster("ppd")
    busy = WorkerError(code=ErrorCode.OVERLOADED, message="full")
    first.refuse = [busy]
    for _ in range(4):
        assert harness.client.post(CHAT, json=BODY).status_code == 200
    first.refuse, second.refuse = [busy] * 9, [busy] * 9
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.status_code == 429 and answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("code", "status"),
    [(ErrorCode.INVALID_REQUEST, 400), (ErrorCode.INTERNAL, 500), (ErrorCode.DEADLINE, 504)],
)
def test_what_no_other_worker_could_do_better(
    cluster: Cluster, code: ErrorCode, status: int
) -> None:
    harness, (prefill, _) = cluster("pd")
    prefill.refuse = [WorkerError(code=code, message="because")]
    answer = harness.client.post(CHAT, json=BODY | {"stream": True})
    assert answer.status_code == status and answer.json()["error"]["message"] == "because"
    assert len(prefill.submits) == 1


def test_an_error_in_mid_stream(cluster: Cluster) -> None:
    harness, (_, decode) = cluster("pd")
    decode.refuse = [WorkerError(code=ErrorCode.INTERNAL, message="a fault of ours")]
    answer = harness.client.post(CHAT, json=BODY | {"stream": True})
    events = frames(answer.text)
    assert answer.status_code == 200
    assert events[-1]["error"] == {
        "message": "a fault of ours",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }


# time and load


@pytest.mark.parametrize("held", [0, 1])
def test_deadlines(cluster: Cluster, held: int) -> None:
    harness, workers = cluster("pd", request_timeout_s=0.4)
    hold(workers[held])
    started = time.monotonic()
    answer = harness.client.post(CHAT, json=BODY | {"stream": True})
    assert time.monotonic() - started < 3
    error = answer.json()["error"] if held == 0 else frames(answer.text)[-1]["error"]
    assert error["code"] == 504 and "0.4 s" in error["message"]
    harness.run(workers[held].until(lambda: len(workers[held].aborts) == 1))


def test_no_worker_yet(start: Start) -> None:
    harness = start()
    for path in ("/health", "/ping"):
        answer = harness.client.get(path)
        assert answer.status_code == 503 and answer.headers["retry-after"]
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert harness.client.get("/v1/models").json()["data"] == []
    harness.add(Role.PREFILL)
    harness.until_connected()
    assert harness.client.get("/health").status_code == 503
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    assert harness.client.get("/health").status_code == 200
    decode.draining = True
    harness.wait(lambda: harness.client.get("/health").status_code == 503)
    assert harness.client.post(CHAT, json=BODY).status_code == 503


def test_more_than_may_be_in_flight(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c", max_queue=2)
    hold(worker)
    with asking(harness, BODY), asking(harness, BODY):
        harness.run(worker.until(lambda: len(worker.submits) == 2))
        answer = harness.client.post(CHAT, json=BODY)
        assert answer.status_code == 429 and answer.headers["retry-after"]
        assert "--max-queue" in answer.json()["error"]["message"]
        harness.run(_go(worker))
    harness.until_idle()
    assert harness.client.post(CHAT, json=BODY).status_code == 200
    many = harness.client.post(CHAT, json=BODY | {"n": 3, "temperature": 1})
    assert many.status_code == 400 and many.json()["error"]["param"] == "n"


def test_the_shortest_worker_sets_the_limit(start: Start) -> None:
    harness = start()
    harness.add(Role.COLOCATED, max_model_len=100)
    harness.add(Role.COLOCATED)
    harness.until_connected()
    assert harness.client.get("/v1/models").json()["data"][0]["max_model_len"] == 100
    body = {"prompt": [1] * 101}
    answer = harness.client.post("/v1/completions", json=body)
    assert answer.status_code == 400 and "100 tokens" in answer.json()["error"]["message"]


def test_both_kinds_share_the_work(cluster: Cluster) -> None:
    harness, (prefill, decode, colocated) = cluster("pdc")
    for worker in (prefill, colocated):
        hold(worker)
    with asking(harness, BODY | {"n": 8, "temperature": 1}):
        harness.wait(lambda: len(prefill.submits) + len(colocated.submits) == 8)
        for worker in (prefill, colocated):
            harness.run(_go(worker))
    assert len(prefill.submits) == len(colocated.submits) == 4
    assert len(decode.submits) == 4


def test_a_slow_reader_stalls_nobody(cluster: Cluster) -> None:
    harness, (worker,) = cluster("c")
    body = json.dumps(LONG | {"max_tokens": 4000, "n": 8, "temperature": 1}).encode()
    host, port = harness.url.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        lazy.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        harness.wait(lambda: worker.running >= 8)
        for _ in range(3):
            assert harness.client.post(CHAT, json=BODY).status_code == 200
        harness.wait(lambda: worker.running == 0)  # it ran to its end without its reader
        assert harness.client.post(CHAT, json=BODY).status_code == 200
    harness.until_idle()


def test_a_client_that_reads_nothing_gives_its_place_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.router.generation.STALL_S", 0.5)
    harness, (worker,) = cluster("c")
    body = json.dumps(LONG | {"max_tokens": 4000, "n": 8, "temperature": 1}).encode()
    host, port = harness.url.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        lazy.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        harness.wait(lambda: worker.running >= 8)
        harness.until_idle()  # though the client never leaves


def test_a_body_that_never_begins_is_timed_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.router.http.BODY_TIMEOUT_S", 0.2)
    harness, _ = cluster("c")
    host, port = harness.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as silent:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        silent.sendall(f"{head}content-length: 100\r\n\r\n".encode())
        assert silent.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_worker_without_lease_and_voice_is_given_up(cluster: Cluster) -> None:
    """As if stopped: its connection stands, but it neither renews its lease nor says anything."""
    harness, (worker,) = cluster("c")
    harness.router.pool._silence_s = 0.3

    async def stop() -> None:
        hold(worker)
        worker._tasks[0].cancel()

    harness.run(stop())
    with asking(harness, BODY) as found:
        harness.run(worker.until(lambda: len(worker.submits) == 1))
        harness.until_connected(0)
        harness.add(Role.COLOCATED)
    assert found[0].status_code == 200
