"""Membership against a real Redis: leases, fencing, one round trip, and Redis going away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis_for_tests import RedisForTests, redis_for_tests

from pdserve.cluster.membership import MOST_GONE, Membership, RedisUnavailable, masked
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.protocol.messages import WorkerStatus

Scenario = Callable[[RedisForTests, Membership], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def main() -> None:
        async with redis_for_tests() as redis:
            membership = Membership(redis.url)
            try:
                async with asyncio.timeout(20):
                    await scenario(redis, membership)
            finally:
                await membership.close()

    asyncio.run(main())


def record(worker_id: str, epoch: int, **changes: Any) -> WorkerRecord:
    plain = WorkerRecord(
        worker_id=worker_id,
        epoch=epoch,
        role=Role.DECODE,
        state=WorkerState.LOADING,
        host="127.0.0.1",
        port=1,
        http_port=2,
        pid=3,
    )
    return msgspec.structs.replace(plain, **changes)


def status(running: int) -> WorkerStatus:
    names = WorkerStatus.__struct_fields__[:9]
    return WorkerStatus(**(dict.fromkeys(names, 0) | {"running": running}))


def test_a_record_comes_back_as_it_was_published() -> None:
    async def scenario(_: RedisForTests, membership: Membership) -> None:
        epoch = await membership.next_epoch("w")
        sent = record("w", epoch, progress=0.5, detail="loading “weights”", cpus=(0, 1),
                      status=status(2), speeds={"p": {"shm": 1e9}})  # fmt: skip
        assert await membership.publish(sent)
        assert await membership.workers() == [sent]

    run(scenario)


def test_workers_are_sorted_and_clusters_apart() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        for name in ("b", "c", "a"):
            await membership.publish(record(name, 1))
        other = Membership(redis.url, "other")
        assert await other.workers() == []
        await other.publish(record("z", 1))
        await other.close()
        assert [worker.worker_id for worker in await membership.workers()] == ["a", "b", "c"]

    run(scenario)


def test_an_older_epoch_is_fenced() -> None:
    async def scenario(_: RedisForTests, membership: Membership) -> None:
        old = await membership.next_epoch("w")
        assert await membership.publish(record("w", old))
        new = await membership.next_epoch("w")
        assert new > old
        assert not await membership.publish(record("w", old)), "the newer one exists already"
        assert await membership.publish(record("w", new))
        await membership.remove("w", old)
        assert [worker.epoch for worker in await membership.workers()] == [new]
        await membership.remove("w", new)
        assert await membership.workers() == []

    run(scenario)


def test_a_worker_that_lapsed_gets_a_new_epoch_unless_it_was_replaced() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        first = await membership.next_epoch("w")
        second = await membership.next_epoch("w", after=first)
        assert second > first
        assert await membership.next_epoch("w", after=first) == 0, "another one has come"
        await redis.stop()
        await redis.start()
        far = second + 10**6
        assert await membership.next_epoch("w", after=far) > far, "an empty Redis knows nobody"

    run(scenario)


def test_a_lease_ends_unless_it_is_renewed() -> None:
    async def scenario(_: RedisForTests, membership: Membership) -> None:
        await membership.publish(record("short", 1), lease_s=0.05)
        await membership.publish(record("long", 1), lease_s=60)
        while len(await membership.workers()) == 2:
            await asyncio.sleep(0.005)
        assert [worker.worker_id for worker in await membership.workers()] == ["long"]

    run(scenario)


def test_epochs_stay_unique_when_redis_loses_its_memory() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        before = [await membership.next_epoch("w") for _ in range(3)]
        assert sorted(set(before)) == before
        await redis.stop()
        with pytest.raises(RedisUnavailable, match="does not answer"):
            await membership.workers()
        await redis.start()
        assert await membership.next_epoch("w") > before[-1]

    run(scenario)


def test_reading_all_workers_is_one_round_trip() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        for number in range(50):
            await membership.publish(record(f"w{number}", 1))
        watcher = Redis.from_url(redis.url)
        commands: list[str] = []
        async with watcher.monitor() as monitor:
            assert len(await membership.workers()) == 50
            await membership.publish(record("finally", 1))
            async for command in monitor.listen():
                if command["client_type"] != "lua":
                    commands.append(command["command"].split()[0].upper())
                if "finally" in command["command"]:
                    break
        await watcher.aclose()
        assert commands == ["EVAL", "EVAL"]

    run(scenario)


def test_who_follows_reads_what_has_changed() -> None:
    async def scenario(_: RedisForTests, membership: Membership) -> None:
        assert await membership.follow() == {}
        loaded = record("a", 1, status=status(3), routes={"p": "shm"})
        for one in (loaded, record("b", 1), record("c", 1)):
            await membership.publish(one, lease_s=60)
        first = await membership.follow()
        assert first == {name: record(name, 1) for name in "abc"}
        await membership.publish(msgspec.structs.replace(loaded, status=status(4)), lease_s=60)
        assert await membership.follow() is first, "a load is nobody's affair"
        assert [one.status for one in await membership.workers()] == [status(4), None, None]
        await membership.publish(record("b", 1, role=Role.PREFILL), lease_s=60)
        await membership.remove("c", 1)
        assert await membership.follow() == {
            "a": record("a", 1),
            "b": record("b", 1, role="prefill"),
        }
        await membership.publish(record("c", 2), lease_s=0.02)
        assert set(await membership.follow()) == {"a", "b", "c"}
        while len(await membership.follow()) > 2:
            await asyncio.sleep(0.005)
        await membership.publish(record("c", 2), lease_s=60)  # late, but not replaced
        assert set(await membership.follow()) == {"a", "b", "c"}

    run(scenario)


def test_who_follows_learns_that_redis_was_emptied() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        for name in "ab":
            await membership.publish(record(name, 1))
        assert set(await membership.follow()) == {"a", "b"}
        await redis.stop()
        await redis.start()
        await membership.publish(record("c", 1))
        assert set(await membership.follow()) == {"c"}
        await redis.stop()
        await redis.start()
        assert await membership.follow() == {}

    run(scenario)


def test_workers_that_have_gone_are_not_remembered_for_ever() -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        await membership.publish(record("stays", 1), lease_s=60)
        late = Membership(redis.url)
        assert set(await late.follow()) == {"stays"}
        for number in range(MOST_GONE + 10):
            await membership.publish(record(f"w{number}", 1))
            await membership.remove(f"w{number}", 1)
        raw = Redis.from_url(redis.url)
        assert await raw.zcard("{pdserve}:changes") < MOST_GONE
        assert await raw.hlen("{pdserve}:conditions") == 1
        await raw.aclose()
        assert set(await late.follow()) == {"stays"}
        await late.close()

    run(scenario)


def test_a_cancellation_is_never_lost() -> None:
    """Python 3.11's wait_for, which the Redis client uses, can swallow one; tasks that poll Redis
    would then go on for ever."""

    async def scenario(_: RedisForTests, membership: Membership) -> None:
        for ticks in range(20):
            await membership.workers()  # so that there is a connection
            task = asyncio.create_task(membership.workers())
            for _ in range(ticks):
                await asyncio.sleep(0)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(scenario)


def test_a_record_of_another_release_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: RedisForTests, membership: Membership) -> None:
        await membership.publish(record("good", 1))
        await membership.publish(record("strange", 1))
        client = Redis.from_url(redis.url)
        await client.hset("{pdserve}:workers", "strange", '{"epoch": 1, "worker_id": "strange"}')
        await client.aclose()
        for _ in range(2):
            assert [worker.worker_id for worker in await membership.workers()] == ["good"]

    run(scenario)
    assert len(caplog.records) == 1, "said once, not at every look"


def test_errors_name_the_url_without_its_password() -> None:
    async def ask() -> None:
        membership = Membership("redis://user:hush@127.0.0.1:1/0")
        try:
            await membership.workers()
        finally:
            await membership.close()

    with pytest.raises(RedisUnavailable) as caught:
        asyncio.run(ask())
    assert "redis://user:***@127.0.0.1:1/0" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_url_that_is_none_is_refused_with_a_sentence() -> None:
    with pytest.raises(RedisUnavailable, match="cannot be used"):
        Membership("http://somewhere")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:p@h:1", "redis://:***@h:1"),
        ("unix://:p@/run/r.sock", "unix://:***@/run/r.sock"),
    ],
)
def test_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
