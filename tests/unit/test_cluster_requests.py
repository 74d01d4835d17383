"""Records of running requests, over a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis_for_tests import redis_for_tests

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.requests import Holder, RequestRecord, RequestRecords

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def url(anyio_backend: str) -> AsyncIterator[str]:
    async with redis_for_tests() as redis:
        yield redis.url


@pytest.fixture
async def records(url: str) -> AsyncIterator[RequestRecords]:
    found = RequestRecords(url, "c")
    yield found
    client = Redis.from_url(url)
    await client.flushall()
    await client.aclose()
    await found.close()


def record(answer_id: str, router: str, tokens: int = 0) -> RequestRecord:
    return RequestRecord(
        id=answer_id, request_id="x", router=router, received=1.0, deadline=2.0, prompt_tokens=3,
        tokens=tokens, holders=[Holder("p", 7, "prefill"), Holder("d", 8, "decode")],
    )  # fmt: skip


async def test_a_heartbeat_replaces_all_records_of_its_router(records: RequestRecords) -> None:
    many = [record(f"a{number}", "r1", number) for number in range(1200)]
    assert await records.beat("r1", many) == []
    await records.beat("r2", [record("b", "r2")])
    assert await records.find("?", "a1199") == many[-1]
    assert await records.routers() == {"r1": 1200, "r2": 1}
    await records.beat("r1", [record("a5", "r1", 99)])
    assert await records.find("a6") is None
    assert (await records.find("a5") or many[0]).tokens == 99
    assert await records.routers() == {"r1": 1, "r2": 1}


async def test_records_end_with_the_lease_of_their_router(
    records: RequestRecords, url: str
) -> None:
    await records.beat("gone", [record("a", "gone")], lease_s=0.001)
    await records.beat("left", [record("b", "left")])
    await records.leave("left")
    await records.beat("here", [])
    while "gone" in await records.routers():
        await records.beat("here", [])
    assert await records.routers() == {"here": 0}
    assert await records.find("a", "b") is None
    client = Redis.from_url(url)
    assert [key async for key in client.scan_iter("{c}:*")] == [b"{c}:routers"]
    await client.aclose()


async def test_who_carries_a_request_is_told_to_end_it_once(records: RequestRecords) -> None:
    await records.beat("r1", [record("a", "r1")])
    await records.beat("r2", [record("b", "r2")])
    await records.abort(["a", "b", "young"], by="r3")
    assert sorted(await records.beat("r1", [])) == ["a", "young"]
    assert sorted(await records.beat("r2", [])) == ["b", "young"]
    assert await records.beat("r1", []) == []
    many = [str(number) for number in range(250)]
    await records.abort(many, by="r3")
    assert sorted(await records.beat("r2", [])) == sorted(many)
    await records.beat("r1", [])
    await records.abort(["young"], by="r1")
    assert await records.beat("r1", []) == [] and await records.beat("r2", []) == ["young"]


async def test_without_redis_it_says_so() -> None:
    records = RequestRecords("redis://127.0.0.1:1", "c")
    with pytest.raises(RedisUnavailable, match="does not answer"):
        await records.beat("r", [])
    await records.close()
