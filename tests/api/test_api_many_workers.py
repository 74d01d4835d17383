"""Clusters so large that a router has no channel to every worker: one per worker that it needs."""

from __future__ import annotations

import socket
from collections.abc import Callable

import msgspec
import pytest
from fake_worker import FakeWorker
from router_harness import BODY, CHAT, TEXT, RedisProcess, RouterHarness

from pdserve.cluster.placement import LoadReport
from pdserve.cluster.records import Role
from pdserve.router import workers as module

Start = Callable[..., RouterHarness]


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single worker is one too many."""
    monkeypatch.setattr(module, "MOST_CHANNELS", 0)


def connected(harness: RouterHarness) -> set[str]:
    return {link.worker_id for link in harness.router.pool.links}


def used(workers: list[FakeWorker]) -> set[str]:
    return {worker.worker_id for worker in workers if worker.submits}


def text(harness: RouterHarness) -> str:
    answer = harness.client.post(CHAT, json=BODY)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_channels_follow_requests(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start()
    workers = [harness.add(role) for role in [Role.PREFILL] * 3 + [Role.DECODE] * 3]
    harness.until_connected()  # that is: known
    assert harness.client.get("/health").status_code == 200 and not connected(harness)
    assert text(harness) == TEXT
    assert connected(harness) == used(workers) and len(used(workers)) == 2
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    harness.wait(lambda: not connected(harness), "for idle channels to end")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MOST_CHANNELS", 0)
    assert text(harness) == TEXT


def test_a_channel_with_a_request_stays(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    harness = start()
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    worker.step_s = 0.005
    assert text(harness) == TEXT and len(worker.submits) == 1
    harness.wait(lambda: not connected(harness), "for the idle channel to end")


def test_early_hand_overs_wait_for_their_channel(start: Start) -> None:
    harness = start()
    prefill = harness.add(Role.PREFILL)
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    prefill.early = True
    assert text(harness) == TEXT
    assert len(decode.submits) == 1 and decode.submits[0].ticket is not None


def test_a_refused_connection_is_noticed_at_once(start: Start) -> None:
    harness = start(routing_policy="round-robin")
    worker = harness.add(Role.COLOCATED)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]

    async def publish_a_ghost() -> None:
        ghost = msgspec.structs.replace(worker._record(), worker_id="ghost", port=port)
        await worker.membership.publish(ghost, 60.0)

    harness.run(publish_a_ghost())
    harness.until_connected(2)
    for _ in range(8):
        assert text(harness) == TEXT
    assert [load.worker_id for load in harness.router.pool.snapshot() if load.shunned] == ["ghost"]


def test_admission_knows_what_workers_without_a_channel_have_to_do(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SURVEY_S", 0.01)
    harness = start(max_waiting=5)
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    pool, placement = harness.router.pool, harness.router._placement

    def report(number: int, load: LoadReport, seen: int) -> None:
        harness.run(placement.report(worker.worker_id, worker.epoch, number, load, [], whole=True))
        harness.wait(lambda: pool.waiting == seen, "for a look at the loads")

    report(1, LoadReport(5000, 9, 64, 7), 7)
    (load,) = pool.snapshot()
    assert (load.queued_tokens, load.requests, load.free_tokens) == (5000, 9, 64)
    refused = harness.client.post(CHAT, json=BODY)
    assert refused.status_code == 429 and "--max-waiting" in refused.text
    report(2, LoadReport(0, 0, 10**6), 0)
    assert text(harness) == TEXT
    harness.run(placement.leave(worker.worker_id, worker.epoch))


def test_a_stream_survives_its_worker(start: Start) -> None:
    harness = start()
    workers = [harness.add(Role.COLOCATED) for _ in range(3)]
    harness.until_connected()

    def only_one_dies() -> None:
        for worker in workers:
            worker.die_at = None

    for worker in workers:
        worker.die_at, worker.on_death = 3, only_one_dies
    assert text(harness) == TEXT
    assert sum(worker.dead for worker in workers) == 1 and len(used(workers)) == 2


def test_redis_comes_back_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody speaks to the workers, so it is believed for a while that they are there."""
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    with RedisProcess() as redis, RouterHarness(redis.url) as harness:
        harness.add(Role.COLOCATED)
        harness.until_connected()
        redis.stop()
        harness.wait(lambda: harness.router.pool.redis_error is not None)
        assert text(harness) == TEXT
        harness.wait(lambda: not connected(harness), "for the idle channel to end")
        looks = harness.router.pool._membership
        redis.start()
        harness.wait(lambda: looks.began_anew, "for the empty Redis to be read")
        assert text(harness) == TEXT
