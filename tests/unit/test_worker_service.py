"""A worker's channels: real sockets, a real engine thread, no tensors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_engine import Bench, continuation

from pdserve.cluster.channel import Channel, ChannelServer, connect
from pdserve.engine.ports import ChunkResult
from pdserve.protocol.blocks import pack_tokens
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import (
    Abort,
    Alive,
    StepFrame,
    Submit,
    ToOperator,
    ToRouter,
    ToWorker,
)
from pdserve.protocol.orders import Drain, OrderDone, Role, SwitchRole
from pdserve.protocol.sampling import SamplingParams
from pdserve.worker.departure import Departure, Remains
from pdserve.worker.service import OnOrder, RouterService

EPOCH = 7
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def worker() -> AsyncIterator[tuple[Bench, ChannelServer]]:
    async with serving() as (bench, server, _):
        yield bench, server


@asynccontextmanager
async def serving(
    orders: OnOrder | None = None, router_lease_s: float = 10.0
) -> AsyncIterator[tuple[Bench, ChannelServer, RouterService]]:
    bench = Bench(num_blocks=64, budget=64)
    service = RouterService(
        EPOCH,
        lambda: (11, 22, 3),
        router_lease_s=router_lease_s,
        measures=bench.engine.measuring.measures,
    )
    bench.engine._sink = service.sink
    service.attach(bench.engine, on_order=orders)
    bench.engine.start()
    server = ChannelServer(
        secret="s", worker_id="w", epoch=EPOCH, receives=ToWorker,
        on_channel=service.on_channel, host="127.0.0.1",
    )  # fmt: skip
    async with server:
        yield bench, server, service
    bench.engine.stop()
    bench.assert_clean()


async def router(server: ChannelServer) -> Channel:
    return await connect("127.0.0.1", server.port, secret="s", name="r", receives=ToRouter)


def submit(request_id: str, prompt: list[int], max_tokens: int = 5, epoch: int = EPOCH) -> Submit:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens)
    return Submit(
        request_id=request_id, epoch=epoch, prompt=pack_tokens(prompt), sampling=sampling,
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
        assert (status.bytes_in, status.bytes_out, status.bytes_early) == (11, 22, 3)
        frames = await frames_until(
            idle, lambda frames: (m := frames[-1].measures) and m.step_tokens.total > 20
        )
        told = [frame for frame in frames if frame.measures is not None]
        assert all(not frame.outputs for frame in told), "heartbeats tell, steps do not"
        await busy.close()
        await idle.close()


async def test_a_draining_worker_refuses_what_is_new_and_finishes_the_rest() -> None:
    async with serving() as (bench, server, service):
        execute, steps = bench.runner.execute, threading.Semaphore(1)

        def step(*arguments: Any) -> list[ChunkResult]:
            steps.acquire()
            return execute(*arguments)

        bench.runner.execute = step  # type: ignore[method-assign]
        channel = await router(server)
        channel.send(submit("old", [1, 2], 200))
        frames = await frames_until(channel, lambda frames: tokens(frames, "old"))
        remains = asyncio.create_task(service.remains(5))
        await asyncio.sleep(0)
        steps.release()
        assert (await remains).requests == 1
        service.drain()
        channel.send(submit("new", [3]))
        frames += await frames_until(channel, finished("new"))
        steps.release(200)
        frames += await frames_until(channel, finished("old"))
        refused = next(o for f in frames for o in f.outputs if o.request_id == "new")
        assert refused.error is not None and refused.error.code is ErrorCode.DRAINING
        assert tokens(frames, "old") == continuation([1, 2], 200)
        assert frames[-1].status is not None and frames[-1].status.draining
        assert not await service.remains(5)
        await channel.close()


async def test_orders_are_carried_out_by_whoever_takes_them() -> None:
    given: list[object] = []

    def obey(order: object, answer: Any) -> None:
        given.append(order)
        answer(OrderDone(requests=len(given)))

    async with serving(obey) as (_, server, _service):
        channel = await connect("127.0.0.1", server.port, secret="s", name="o", receives=ToOperator)
        orders = [
            SwitchRole(epoch=EPOCH, role=Role.DECODE),
            Drain(epoch=EPOCH, timeout_s=3),
            Drain(epoch=EPOCH + 1, timeout_s=3),
        ]
        for order in orders:
            channel.send(order)
        answers: list[OrderDone] = []
        async with asyncio.timeout(10):
            async for message in channel:
                answers += [message] if isinstance(message, OrderDone) else []
                if len(answers) == len(orders):
                    break
        assert given == orders[:2] and [answer.requests for answer in answers] == [1, 2, 0]
        assert answers[2].error is not None
        assert answers[2].error.code is ErrorCode.STALE_EPOCH
        await channel.close()


class Hand:
    """A clock moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_departure_by_order() -> None:
    clock = Hand()
    departure, left = Departure(0.0, clock), []
    departure.order(50.0, left.append)
    departure.order(20.0, left.append)
    assert departure.begun and not departure.at_once
    clock.now += 20
    assert departure.at_once, "the shorter time counts"
    departure.say_farewell(Remains(1, 2))
    departure.say_farewell(Remains(0, 0))
    assert left == [Remains(1, 2)] * 2
    assert departure.code(Remains(1, 2)) == 0, "nobody is to start it again"


async def test_a_departure_by_order_and_signals() -> None:
    departure = Departure(30.0, clock := Hand())
    departure.order(600.0, lambda left: None)
    departure.signal()
    assert not departure.at_once
    clock.now += 30
    assert departure.at_once
    departure = Departure(30.0, Hand())
    departure.order(600.0, lambda left: None)
    departure.signal()
    departure.signal()
    assert departure.at_once


async def test_a_departure_by_signal() -> None:
    """With time to drain the first signal drains and the second one ends it; without, the first."""
    clock = Hand()
    for grace_s, signals, at_once in ((30.0, 1, False), (30.0, 2, True), (0.0, 1, True)):
        departure = Departure(grace_s, clock)
        assert not departure.begun
        for _ in range(signals):
            departure.signal()
        assert departure.begun and departure.at_once is at_once
        assert departure.code(Remains(0, 0)) == (0 if grace_s else 143)
        assert departure.code(Remains(1, 0)) == 143


async def test_a_router_that_says_nothing_for_too_long_is_cut_off() -> None:
    """Its requests end; one that says that it lives is left in peace, and so is an operator."""
    async with serving(router_lease_s=2.0) as (_, server, service):
        silent, alive, operator = [await router(server) for _ in range(3)]
        silent.send(submit("a", [1, 2], 250))
        alive.send(submit("b", [3], 5))
        await frames_until(silent, lambda frames: tokens(frames, "a"))

        async def live() -> None:
            while True:
                alive.send(Alive(epoch=EPOCH))
                await asyncio.sleep(0.05)

        living = asyncio.create_task(live())
        async with asyncio.timeout(10):
            async for _ in silent:
                pass
        assert not await service.remains(5)
        assert not alive.closed and not operator.closed
        living.cancel()
        for channel in (silent, alive, operator):
            await channel.close()
