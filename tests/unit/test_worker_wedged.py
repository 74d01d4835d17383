"""A worker whose engine gets stuck: real shell, Redis and channels, no tensors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from fake_engine import Bench, continuation
from redis_for_tests import redis_for_tests

from pdserve.cluster.channel import Channel, connect
from pdserve.cluster.membership import Membership
from pdserve.cluster.records import ModelInfo, WorkerRecord, WorkerState
from pdserve.cluster.settings import WorkerSettings
from pdserve.engine import pace as pace_module
from pdserve.engine.grammar import Grammars
from pdserve.engine.pace import Pace
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.protocol.blocks import pack_tokens
from pdserve.protocol.messages import Submit, ToRouter
from pdserve.protocol.sampling import SamplingParams
from pdserve.router import workers as workers_module
from pdserve.worker import presence, shell
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.shell import WorkerProcess

pytestmark = pytest.mark.anyio
MODEL = ModelInfo(
    architecture="Fake", dtype="float32", max_model_len=256, vocab_size=99, block_size=4,
    fingerprint="f",
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Wedge:
    """Makes the steps of an engine wait."""

    def __init__(self, bench: Bench) -> None:
        self._execute = bench.runner.execute
        bench.runner.execute = self.execute  # type: ignore[method-assign]
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def execute(self, chunks: Sequence[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        if not self.open.is_set():
            self.entered.set()
            assert self.open.wait(20)
        return self._execute(chunks, watcher)


@asynccontextmanager
async def worker(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> AsyncIterator[Membership]:
    def compose(context: Context) -> Assembly:
        bench.engine._sink = context.sink
        return Assembly(
            engine=bench.engine,
            model=MODEL,
            grammars=cast(Grammars, None),
            transports=("tcp",),
            traffic=lambda: (0, 0, 0),
            measures=bench.engine.measuring.measures,
            routes=dict,
            speeds=dict,
            begin_epoch=lambda epoch: None,
            close=lambda: None,
        )

    monkeypatch.setattr(shell, "_compose", compose)
    async with redis_for_tests() as redis:
        settings = WorkerSettings(model="m", redis=redis.url, secret="s", worker_id="w")
        process = WorkerProcess(settings)
        running = asyncio.create_task(process.run())
        membership = Membership(redis.url, settings.cluster)
        try:
            yield membership
            process._departure.order(0.0, lambda left: None)
            assert await running == 0
        finally:
            running.cancel()
            await membership.close()


async def until(membership: Membership, holds: Callable[[list[WorkerRecord]], Any]) -> Any:
    """What `holds` says of the records, once it is true."""
    async with asyncio.timeout(20):
        while not (found := holds(await membership.workers())):
            await asyncio.sleep(0.01)
    return found


def ready(records: list[WorkerRecord]) -> WorkerRecord | None:
    return next((one for one in records if one.state is WorkerState.READY), None)


async def reach(record: WorkerRecord) -> Channel:
    return await connect(record.host, record.port, secret="s", name="r", receives=ToRouter)


def submit(request_id: str, epoch: int) -> Submit:
    return Submit(
        request_id=request_id, epoch=epoch, prompt=pack_tokens([1, 2, 3]), timeout_s=60.0,
        sampling=SamplingParams(seed=0, max_tokens=3),
    )  # fmt: skip


async def all_of(channel: Channel, request_id: str) -> list[int]:
    """Tokens of a request until it ends, or the channel does."""
    found: list[int] = []
    async for frame in channel:
        for output in frame.outputs:
            if output.request_id == request_id:
                found += output.token_ids
                if output.finish_reason is not None:
                    return found
    return found


async def within(s: float, work: Awaitable[Any]) -> Any:
    async with asyncio.timeout(s):
        return await work


async def test_a_worker_whose_engine_is_stuck_is_out_before_its_lease_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "LEASE_S", 600.0)
    pace = Pace(least_s=0.3)
    pace.compute(100)
    pace.turn()
    bench = Bench(num_blocks=64, budget=64, pace=pace)
    wedge = Wedge(bench)
    async with worker(monkeypatch, bench) as membership:
        record = await until(membership, ready)
        channel = await reach(record)
        channel.send(submit("a", record.epoch))
        assert await within(10, all_of(channel, "a")) == continuation([1, 2, 3], 3)
        wedge.open.clear()
        channel.send(submit("b", record.epoch))
        await asyncio.to_thread(wedge.entered.wait, 10)
        await until(membership, lambda records: not records)
        assert await within(10, all_of(channel, "b")) == [], "the channel ends"
        await channel.close()
        stranger = await reach(record)
        assert stranger.epoch == shell.NOBODY
        await stranger.close()

        wedge.open.set()
        again = await until(membership, ready)
        assert again.epoch > record.epoch
        channel = await reach(again)
        channel.send(submit("c", again.epoch))
        assert await within(10, all_of(channel, "c")) == continuation([1, 2, 3], 3)
        await channel.close()
    bench.engine.check_integrity()


def test_stuck_or_frozen_a_worker_is_out_within_three_seconds() -> None:
    """The longest waits on the way, added up: to notice, to tell, and the routers' looking."""
    stuck = pace_module.LEAST_S + presence.TICK_S + workers_module.REFRESH_S
    assert stuck <= 3.0 and pace_module.LEAST_S + presence.TICK_S + shell.LOOK_S <= 3.0
    assert presence.LEASE_S + workers_module.REFRESH_S <= 3.0
