"""A worker's channels: real sockets, a real engine thread, no tensors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_engine import Bench, continuation

from pdserve.cluster.channel import Channel, ChannelServer, connect
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import Abort, StepFrame, Submit, ToRouter, ToWorker
from pdserve.protocol.sampling import SamplingParams
from pdserve.worker.service import RouterService

EPOCH = 7
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def worker() -> AsyncIterator[tuple[Bench, ChannelServer]]:
    bench = Bench(num_blocks=64, budget=64)
    service = RouterService(EPOCH, lambda: (11, 22))
    bench.engine._sink = service.sink
    service.attach(bench.engine)
    bench.engine.start()
    server = ChannelServer(
        secret="s", worker_id="w", epoch=EPOCH, receives=ToWorker,
        on_channel=service.on_channel, host="127.0.0.1",
    )  # fmt: skip
    async with server:
        yield bench, server
    bench.engine.stop()
    bench.assert_clean()


async def router(server: ChannelServer) -> Channel:
    return await connect("127.0.0.1", server.port, secret="s", name="r", receives=ToRouter)


def submit(request_id: str, prompt: list[int], max_tokens: int = 5, epoch: int = EPOCH) -> Submit:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens)
    return Submit(
        request_id=request_id, epoch=epoch, prompt_token_ids=prompt, sampling=sampling,
        timeout_s=30,
    )  # fmt: skip


async def frames_until(channel: Channel, done: Any) -> list[StepFrame]:
    frames: list[StepFrame] = []
    async with asyncio.timeout(10):
        async for frame in channel:
            frames.append(frame)
            if done(frames):
                return frames
    raise AssertionError("the channel ended")


def finished(*names: str) -> Any:
    def done(frames: list[StepFrame]) -> bool:
        ended = {o.request_id for f in frames for o in f.outputs if o.finish_reason}
        return ended >= set(names)

    return done


def tokens(frames: list[StepFrame], name: str) -> list[int]:
    return [t for f in frames for o in f.outputs if o.request_id == name for t in o.token_ids]


async def test_one_frame_per_step_carries_all_requests() -> None:
    async with worker() as (_, server):
        channel = await router(server)
        for name in "abc":
            channel.send(submit(name, [1, 2, ord(name)]))
        frames = await frames_until(channel, finished("a", "b", "c"))
        for name in "abc":
            assert tokens(frames, name) == continuation([1, 2, ord(name)], 5)
        carrying = [frame for frame in frames if frame.outputs]
        assert len({frame.step for frame in carrying}) == len(carrying)
        assert max(len(frame.outputs) for frame in carrying) == 3
        await channel.close()


async def test_another_epoch_is_refused() -> None:
    async with worker() as (_, server):
        channel = await router(server)
        channel.send(submit("a", [1], epoch=EPOCH - 1))
        frames = await frames_until(channel, finished("a"))
        output = next(output for frame in frames for output in frame.outputs)
        assert output.error is not None
        assert output.error.code is ErrorCode.STALE_EPOCH
        channel.send(Abort(request_id="a", epoch=EPOCH - 1))
        await channel.close()


async def test_a_router_that_leaves_takes_its_requests_along_and_only_its_own() -> None:
    async with worker() as (_, server):
        first, second = await router(server), await router(server)
        first.send(submit("a", [1, 2], 200))
        await frames_until(first, lambda frames: tokens(frames, "a"))
        second.send(submit("b", [3], 40))
        await first.close()
        frames = await frames_until(second, finished("b"))
        assert tokens(frames, "b") == continuation([3], 40)
        frames = await frames_until(
            second, lambda frames: (s := frames[-1].status) and not s.running
        )
        await second.close()


async def test_an_idle_worker_shows_that_it_lives() -> None:
    async with worker() as (_, server):
        channel = await router(server)
        began = asyncio.get_running_loop().time()
        await frames_until(channel, lambda frames: len(frames) == 4)
        assert asyncio.get_running_loop().time() - began < 5
        await channel.close()


async def test_idle_routers_hear_of_the_load() -> None:
    async with worker() as (_, server):
        busy, idle = await router(server), await router(server)
        busy.send(submit("a", [1, 2], 20))
        frames = await frames_until(idle, lambda frames: (s := frames[-1].status) and s.steps >= 20)
        assert all(not frame.outputs for frame in frames)
        status = frames[-1].status
        assert status is not None
        assert (status.bytes_in, status.bytes_out) == (11, 22)
        await busy.close()
        await idle.close()
