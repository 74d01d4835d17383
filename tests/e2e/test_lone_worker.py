"""One worker process and its Redis, no launcher: frozen and thawed, and told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from live_cluster import is_clean, metrics
from redis_for_tests import RedisForTests, redis_for_tests

from pdserve.cluster.channel import Channel, connect
from pdserve.cluster.membership import Membership
from pdserve.cluster.records import WorkerRecord, WorkerState
from pdserve.protocol.blocks import pack_tokens
from pdserve.protocol.errors import ErrorCode
from pdserve.protocol.messages import Abort, Alive, StepFrame, Submit, ToRouter
from pdserve.protocol.sampling import SamplingParams
from pdserve.worker.presence import LEASE_S

pytestmark = [pytest.mark.timeout(180), pytest.mark.anyio]
SECRET = "lone"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def worker(
    redis: RedisForTests, model: Path, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "pdserve.decode_worker", "--accept-prompts",
        "--worker-id", "w", "--model", str(model), "--dtype", "float32",
        "--kv-cache-memory", "32MiB", *options,
        env={**os.environ, "PDSERVE_SECRET": SECRET, "PDSERVE_REDIS": redis.url},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ready(membership: Membership, after: int = 0) -> WorkerRecord:
    """The worker's record, once it is ready in a later epoch."""
    async with asyncio.timeout(60):
        while True:
            for record in await membership.workers():
                if record.state is WorkerState.READY and record.epoch > after:
                    return record
            await asyncio.sleep(0.02)


class Router:
    """A channel that says, as a router's does, that its owner lives."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                self.channel.send(Alive(epoch=self.channel.epoch))
                await asyncio.sleep(0.5)

    async def close(self) -> None:
        self._beating.cancel()
        await self.channel.close()


async def router_of(record: WorkerRecord) -> Router:
    return Router(
        await connect(record.host, record.port, secret=SECRET, name="r", receives=ToRouter)
    )


def submit(name: str, epoch: int, max_tokens: int, hand_off: bool = False) -> Submit:
    return Submit(
        request_id=name, epoch=epoch, prompt=pack_tokens(range(10, 60)), hand_off=hand_off,
        sampling=SamplingParams(seed=1, max_tokens=max_tokens, temperature=0), timeout_s=60,
    )  # fmt: skip


async def frames(channel: Channel, *wanted: str) -> list[StepFrame]:
    """Until each of the requests has had an output, or the channel ends."""
    found: list[StepFrame] = []
    missing = set(wanted)
    async with asyncio.timeout(30):
        async for frame in channel:
            found.append(frame)
            missing -= {output.request_id for output in frame.outputs}
            if wanted and not missing:
                break
    return found


async def answer(channel: Channel, message: Submit) -> list[int]:
    """All tokens of a request."""
    channel.send(message)
    tokens: list[int] = []
    async with asyncio.timeout(60):
        async for frame in channel:
            for output in frame.outputs:
                assert output.request_id == message.request_id
                assert output.error is None, output.error
                tokens += output.token_ids
                if output.finish_reason:
                    return tokens
    raise AssertionError("the channel ended")


async def test_a_worker_that_was_frozen_begins_anew(tmp_path: Path) -> None:
    """No replacement comes: it notices by itself that its lease is over."""
    model = make_checkpoint(tmp_path / "nano", "llama", "nano")
    async with redis_for_tests() as redis, worker(redis, model) as process:
        membership = Membership(redis.url)
        before = await ready(membership)
        router = await router_of(before)
        channel = router.channel
        channel.send(submit("held", before.epoch, 20, hand_off=True))
        channel.send(submit("long", before.epoch, 900))
        await frames(channel, "held", "long")
        process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        while await membership.workers():
            await asyncio.sleep(0.02)
        assert time.monotonic() - frozen_at < 3
        await asyncio.sleep(max(0.0, frozen_at + LEASE_S + 0.1 - time.monotonic()))
        process.send_signal(signal.SIGCONT)

        late = await frames(channel)  # to the end: it closes every channel
        assert {frame.epoch for frame in late} <= {before.epoch}
        after = await ready(membership, before.epoch)
        assert (after.pid, after.port) == (before.pid, before.port), "nothing was loaded again"
        async with asyncio.timeout(10):
            while not is_clean(metrics(after.host, after.http_port)):
                await asyncio.sleep(0.05)
        await router.close()
        router = await router_of(after)
        channel = router.channel
        assert channel.epoch == after.epoch
        channel.send(submit("stale", before.epoch, 5))
        [refused] = [o for f in await frames(channel, "stale") for o in f.outputs]
        assert refused.error is not None and refused.error.code is ErrorCode.STALE_EPOCH
        assert len(await answer(channel, submit("fresh", after.epoch, 30))) == 30
        await router.close()
        await membership.close()


async def test_redis_away_changes_nothing_and_a_signal_drains(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "nano", "llama", "nano")
    async with redis_for_tests() as redis, worker(redis, model) as process:
        membership = Membership(redis.url)
        before = await ready(membership)
        await redis.stop()
        await asyncio.sleep(LEASE_S + 1)
        await redis.start()
        assert (await ready(membership)).epoch == before.epoch

        # SIGTERM: what it has is finished, and what others must still fetch is waited for.
        router = await router_of(before)
        channel = router.channel
        channel.send(submit("held", before.epoch, 20, hand_off=True))
        await frames(channel, "held")
        waiting = asyncio.create_task(answer(channel, submit("long", before.epoch, 900)))
        async with asyncio.timeout(30):
            while not metrics(before.host, before.http_port)["running"]:
                await asyncio.sleep(0)
        process.send_signal(signal.SIGTERM)
        assert len(await waiting) == 900
        async with asyncio.timeout(10):
            while not (
                (record := (await membership.workers())[0]).state is WorkerState.DRAINING
                and record.status is not None
                and (record.status.running, record.status.tickets) == (0, 1)
            ):
                await asyncio.sleep(0.02)
        assert process.returncode is None
        channel.send(Abort(request_id="held", epoch=before.epoch))
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert await membership.workers() == []
        await router.close()
        await membership.close()
