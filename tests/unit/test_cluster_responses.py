"""Responses in a real Redis: leases, limits, logs of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis_for_tests import RedisForTests, redis_for_tests

from pdserve.cluster import responses
from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.responses import ResponseStore, StoredResponse

Make = Callable[..., ResponseStore]
Scenario = Callable[[RedisForTests, Make], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def main() -> None:
        stores: list[ResponseStore] = []
        async with redis_for_tests() as redis:

            def make(**options: Any) -> ResponseStore:
                stores.append(ResponseStore(redis.url, **({"ttl_s": 60} | options)))
                return stores[-1]

            try:
                async with asyncio.timeout(20):
                    await scenario(redis, make)
            finally:
                for store in stores:
                    await store.close()

    asyncio.run(main())


def response(name: str, status: str = "completed", text: str = "") -> StoredResponse:
    return StoredResponse(
        body={"id": name, "status": status, "output": [text], "error": None},
        history=[{"a": 1}],
        input=[{"b": 2}],
        background=status != "completed",
        stream=True,
    )


async def keys(redis: RedisForTests) -> set[str]:
    client = Redis.from_url(redis.url)
    try:
        return {key.decode() for key in await client.keys()}
    finally:
        await client.aclose()


async def sizes(redis: RedisForTests) -> dict[str, int]:
    client = Redis.from_url(redis.url)
    try:
        found = await client.hgetall("{pdserve}:response-sizes")  # type: ignore[misc]
        return {name.decode(): int(size) for name, size in found.items()}
    finally:
        await client.aclose()


def test_what_is_stored_is_found_until_it_is_deleted() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store, other = make(), make()
        assert await store.create(response("a"))
        assert await other.find("a") == response("a")
        assert not await store.create(response("a")), "the id is taken"
        assert not await store.cancel("a") and not await store.renew("a", "in_progress")
        assert await other.delete("a") and not await store.delete("a")
        assert await store.find("a") is None
        assert await sizes(redis) == {"": 0}

    run(scenario)


def test_an_open_one_is_renewed_and_finished() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make()
        await store.create(response("a", "queued"))
        assert await store.renew("a", "in_progress", 0, [b"0"])
        assert await store.renew("a", "in_progress", 0, [b"0", b"1"]), "the first was known"
        assert await store.events("a", 0, 10) == ("in_progress", 2, [b"0", b"1"])
        end = {**response("a").body, "output": ["done"]}
        assert await store.finish(end, 1, [b"1", b"2", b"3"])
        assert not await store.finish(end, 4, [b"4"])
        assert await store.events("a", 1, 2) == ("completed", 4, [b"1", b"2"])
        found = await store.find("a")
        assert found is not None and found.body == end and not found.open
        total = (await sizes(redis))["a"]
        assert total == (await sizes(redis))[""]
        assert total == sum(map(len, ('[{"a":1}]', '[{"b":2}]', "0123"))) + len(
            responses.msgspec.json.encode(end)
        )
        assert await store.events("nobody", 0, 10) == ("", 0, [])

    run(scenario)


def test_an_owner_that_is_silent_has_lost_it() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make(lease_s=0.05)
        await store.create(response("a", "queued"))
        await asyncio.sleep(0.1)
        found = await store.find("a")
        assert found is not None and found.body["status"] == "failed"
        assert found.body["error"]["code"] == "server_error"
        assert not await store.renew("a", "in_progress"), "it comes too late"
        assert not await store.finish(response("a").body)
        assert not await store.cancel("a")

    run(scenario)


def test_a_cancelled_one_takes_nothing_more() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make()
        await store.create(response("a", "queued"))
        assert await store.cancel("a") and not await store.cancel("a")
        assert not await store.renew("a", "in_progress", 0, [b"0"])
        assert await store.events("a", 0, 10) == ("cancelled", 0, [])

    run(scenario)


def test_the_oldest_make_room() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make(keep=3)
        for name in "abcde":
            await store.create(response(name))
            await asyncio.sleep(0.002)
        assert [await store.find(name) is not None for name in "abcde"] == [False] * 2 + [True] * 3
        small = make(keep_bytes=3000)
        await small.create(response("f", text="x" * 2000))
        await small.create(response("g", text="x" * 2000))
        assert await small.find("f") is None and await small.find("g") is not None
        assert set(await sizes(redis)) == {"", "g"}

    run(scenario)


def test_all_of_it_expires() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make(ttl_s=1)
        await store.create(response("a", "queued"))
        await store.renew("a", "in_progress", 0, [b"0"])
        assert len(await keys(redis)) == 4
        while await keys(redis):
            await asyncio.sleep(0.05)

    run(scenario)


def test_what_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_BYTES", 100)

    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make()
        with pytest.raises(ValueError, match="at most 100"):
            await store.create(response("a", text="x" * 100))
        await store.create(response("a", "queued"))
        with pytest.raises(ValueError, match="at most 100"):
            await store.finish(response("a", text="x" * 100).body)

    run(scenario)


def test_without_redis() -> None:
    async def scenario(redis: RedisForTests, make: Make) -> None:
        store = make()
        await redis.stop()
        for ask in (store.check(), store.find("a"), store.create(response("a")),
                    store.cancel("a"), store.events("a", 0, 1)):  # fmt: skip
            with pytest.raises(RedisUnavailable):
                await ask
        with pytest.raises(RedisUnavailable, match="cannot be used"):
            ResponseStore("nonsense", ttl_s=1)

    run(scenario)
