"""What keeps answers going: patience, breakers, epochs, and a router without its Redis."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import fake_worker
import httpx
import msgspec
import pytest
from fake_worker import FakeWorker
from router_harness import TEXT, RedisProcess, RouterHarness

from pdserve.cluster.records import Role, WorkerState
from pdserve.protocol.errors import ErrorCode, WorkerError
from pdserve.protocol.events import RECOMPUTED
from pdserve.protocol.messages import LifeEvent, Output, StepFrame, Submit

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
Start = Callable[..., RouterHarness]


class Asking(threading.Thread):
    """One streamed answer."""

    def __init__(self, harness: RouterHarness) -> None:
        super().__init__()
        self._url = harness.url + CHAT
        self.text = ""
        self.last = ""
        self.start()

    def run(self) -> None:
        body = BODY | {"stream": True}
        answer = httpx.post(self._url, json=body, timeout=20, trust_env=False)
        for line in answer.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", []):
                    self.text += choice["delta"].get("content") or ""
            self.last = line or self.last


def count(workers: list[FakeWorker]) -> list[int]:
    return [len(worker.submits) for worker in workers]


def test_an_answer_waits_for_a_worker_that_is_loading(start: Start) -> None:
    """For longer than its patience."""
    harness = start()
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    loading = msgspec.structs.replace(
        worker._record(), worker_id="later", epoch=1, state=WorkerState.LOADING, port=0
    )
    harness.run(worker.membership.publish(loading, 60.0))
    harness.wait(lambda: harness.router.pool.loading)
    room = harness.router.dispatcher.waiting
    room.patience_s = 0.02
    looks: list[bool] = []
    ask = room._loading
    room._loading = lambda: looks.append(True) or ask()  # type: ignore[func-returns-value]
    worker.die_at = 5
    asking = Asking(harness)
    harness.wait(lambda: len(looks) > 5)
    harness.add(Role.COLOCATED)
    asking.join(20)
    assert (asking.text, asking.last) == (TEXT, "data: [DONE]")


def test_a_lost_connection_is_noticed_at_once_and_not_after_the_lease(start: Start) -> None:
    harness = start()
    workers = [harness.add(Role.COLOCATED) for _ in range(2)]
    harness.until_connected()
    for worker in workers:
        worker.pause_at = 3
    asking = Asking(harness)
    harness.wait(lambda: any(not worker.go.is_set() for worker in workers))
    dying, other = sorted(workers, key=lambda worker: worker.go.is_set())
    other.pause_at = None

    async def die() -> list[str]:
        """Who is in the cluster once the other one has the request."""
        await dying.die()
        await dying.membership.publish(dying._record(), 60.0)  # its lease has hardly begun
        await other.until(lambda: len(other.submits) == 1)
        return [record.worker_id for record in await other.membership.workers()]

    assert dying.worker_id in harness.run(die())
    asking.join(20)
    assert asking.text == TEXT
    harness.run(other.membership.remove(dying.worker_id, dying.epoch))


def test_a_worker_with_faults_of_its_own_is_left_alone_for_a_while(start: Start) -> None:
    harness = start(routing_policy="round-robin")
    workers = [harness.add(Role.COLOCATED) for _ in range(2)]
    harness.until_connected()
    good, bad = workers
    bad.refuse = [WorkerError(code=ErrorCode.INTERNAL, message="on fire")] * 3
    codes = [harness.client.post(CHAT, json=BODY).status_code for _ in range(6)]
    assert codes.count(500) == 3
    before = count([bad])
    assert all(harness.client.post(CHAT, json=BODY).status_code == 200 for _ in range(6))
    assert count([bad]) == before
    good.refuse = [WorkerError(code=ErrorCode.OVERLOADED, message="full")]
    assert harness.client.post(CHAT, json=BODY).status_code == 200, "better than nobody"


def test_faults_of_clients_are_not_held_against_a_worker(start: Start) -> None:
    harness = start(routing_policy="round-robin")
    workers = [harness.add(Role.COLOCATED) for _ in range(2)]
    harness.until_connected()
    for code in (ErrorCode.INVALID_REQUEST, ErrorCode.DEADLINE):
        workers[0].refuse += [WorkerError(code=code, message="yours")] * 4
    for _ in range(16):
        harness.client.post(CHAT, json=BODY)
    assert count(workers) == [8, 8]


def test_a_pair_that_fails_is_parted_and_its_halves_go_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one prefill worker never arrive, so its readers compute prompts again."""
    harness = start(routing_policy="round-robin")
    prefills = [harness.add(Role.PREFILL) for _ in range(2)]
    decodes = [harness.add(Role.DECODE) for _ in range(2)]
    harness.until_connected()
    life, bad = fake_worker._life, prefills[0].worker_id

    def recomputed(submit: Submit) -> tuple[LifeEvent, ...]:
        lost = submit.ticket is not None and submit.ticket.source == bad
        return (*life(submit), *([LifeEvent(RECOMPUTED, 0.01)] if lost else []))

    monkeypatch.setattr(fake_worker, "_life", recomputed)
    pairs = harness.router.dispatcher.pairs
    readers = {worker.worker_id for worker in decodes}
    deadline = time.monotonic() + 10
    while pairs.shunned(bad) != readers:
        assert time.monotonic() < deadline
        assert harness.client.post(CHAT, json=BODY).status_code == 200
    assert pairs.shunned(prefills[1].worker_id) == set()
    assert not any(load.shunned for load in harness.router.pool.snapshot())
    assert harness.client.post(CHAT, json=BODY).status_code == 200, "there is nobody else"


def test_frames_of_another_epoch_reach_nobody(start: Start) -> None:
    harness = start()
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    worker.pause_at = 3
    asking = Asking(harness)
    harness.run(worker.until(lambda: not worker.go.is_set()))
    link = harness.router.pool.link(worker.worker_id)
    assert link is not None
    stale = Output(request_id=worker.submits[0].request_id, token_ids=[1, 2, 3])

    async def deliver() -> None:
        link.receive(StepFrame(epoch=worker.epoch - 1, step=1, outputs=[stale]))
        worker.pause_at = None
        worker.go.set()

    harness.run(deliver())
    asking.join(20)
    assert asking.text == TEXT


def test_redis_goes_and_comes_back_empty() -> None:
    """What runs goes on, what is new is served over the last view, and who comes later is seen."""
    with RedisProcess() as redis, RouterHarness(redis.url) as harness:
        prefill, decode = harness.add(Role.PREFILL), harness.add(Role.DECODE)
        harness.until_connected()
        decode.pause_at = 3
        asking = Asking(harness)
        harness.run(decode.until(lambda: not decode.go.is_set()))
        redis.stop()
        harness.wait(lambda: harness.router.pool.redis_error is not None)

        async def go_on() -> None:
            decode.pause_at = None
            decode.go.set()

        harness.run(go_on())
        asking.join(20)
        assert asking.text == TEXT
        began = time.monotonic()
        assert harness.client.post(CHAT, json=BODY).status_code == 200
        assert time.monotonic() - began < 2
        redis.start()  # the workers have not published themselves yet, but they speak
        harness.wait(lambda: harness.router.pool.redis_error is None)
        assert harness.client.post(CHAT, json=BODY).status_code == 200
        harness.add(Role.DECODE)
        harness.until_connected(3)
        assert harness.client.post(CHAT, json=BODY).status_code == 200
        assert count([prefill]) == [4]
