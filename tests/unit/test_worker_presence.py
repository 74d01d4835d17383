"""A worker's lease: what renews it, what ends it, and what follows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.worker import presence as module
from pdserve.worker.presence import Presence

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_S", 0.3), ("RENEW_S", 0.05), ("TICK_S", 0.02), ("FROZEN_S", 0.2)):
        monkeypatch.setattr(module, name, seconds)


class FakeMembership:
    """Redis as one worker sees it."""

    def __init__(self) -> None:
        self.published: list[WorkerRecord] = []
        self.listed: WorkerRecord | None = None
        self.newest = 1
        self.away = False
        self.changed = asyncio.Event()

    async def publish(self, record: WorkerRecord, lease_s: float) -> bool:
        self.changed.set()
        if self.away:
            raise RedisUnavailable("Redis is away.")
        if record.epoch < self.newest:
            return False
        self.newest = record.epoch
        self.published.append(record)
        self.listed = record
        return True

    async def next_epoch(self, worker_id: str, after: int = 0) -> int:
        if self.away:
            raise RedisUnavailable("Redis is away.")
        if self.newest > after:
            return 0
        self.newest += 1
        return self.newest

    async def remove(self, worker_id: str, epoch: int) -> None:
        self.listed = None

    async def next_publish(self) -> None:
        self.changed.clear()
        async with asyncio.timeout(5):
            await self.changed.wait()


@contextlib.asynccontextmanager
async def present(
    redis: FakeMembership, alive: Callable[[], bool] = lambda: True
) -> AsyncIterator[Presence]:
    record = WorkerRecord(
        worker_id="w", epoch=1, role=Role.DECODE, state=WorkerState.READY, host="h", port=1,
        http_port=2, pid=3,
    )  # fmt: skip
    presence = Presence(cast("Membership", redis), record, alive)
    task = asyncio.create_task(presence.run())
    try:
        await redis.next_publish()
        yield presence
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_redis_away_for_long_is_no_lapse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FROZEN_S", 10.0)  # a busy machine is not what is tested
    redis = FakeMembership()
    async with present(redis) as presence:
        redis.away = True
        until_then = time.monotonic() + 3 * module.LEASE_S
        while time.monotonic() < until_then:
            await redis.next_publish()
        redis.away, known = False, len(redis.published)
        await until(lambda: len(redis.published) > known)
        assert not presence.lapsed


async def test_a_process_that_did_not_run_has_lapsed() -> None:
    """Whoever wakes first, the old epoch is not renewed."""
    redis = FakeMembership()
    async with present(redis) as presence:
        for epoch in (1, 2, 3):
            known = len(redis.published)
            time.sleep(module.LEASE_S + 0.2)  # nothing else runs meanwhile: that is the point
            await until(lambda: presence.lapsed)
            assert len(redis.published) == known
            assert await presence.next_epoch() == epoch + 1
            presence.begin(epoch + 1)
            await until(lambda known=known: len(redis.published) > known)  # type: ignore[misc]
            assert redis.published[-1].epoch == epoch + 1 and not presence.lapsed


async def test_an_engine_that_is_stuck_gives_up_the_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 600.0)  # nobody waits for its end
    redis, alive = FakeMembership(), True
    async with present(redis, lambda: alive) as presence:
        alive = False
        await until(lambda: presence.lapsed and redis.listed is None)
        known = len(redis.published)
        presence.update(detail="whatever")
        await asyncio.sleep(2 * module.RENEW_S)
        assert len(redis.published) == known
        redis.away = True
        assert await presence.next_epoch() is None and not presence.fenced.is_set()
        redis.away, redis.newest = False, 7
        assert await presence.next_epoch() is None and presence.fenced.is_set()


async def test_nothing_lapses_while_the_model_loads() -> None:
    redis = FakeMembership()
    async with present(redis) as presence:
        presence.update(state=WorkerState.LOADING)
        await redis.next_publish()
        time.sleep(module.LEASE_S + 0.2)
        await redis.next_publish()
        presence.update(state=WorkerState.READY)
        await redis.next_publish()
        assert not presence.lapsed


async def test_who_has_left_is_not_published_again() -> None:
    redis = FakeMembership()
    async with present(redis) as presence:
        await presence.leave()
        presence.update(detail="late")
        known = len(redis.published)
        await asyncio.sleep(2 * module.RENEW_S)
        assert redis.listed is None and len(redis.published) == known
