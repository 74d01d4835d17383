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
from pdserve.protocol.messages import StepFrame, Submit, ToRouter
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


async def channel_to(record: WorkerRecord) -> Channel:
    return await connect(record.host, record.port, secret=SECRET, name="r", receives=ToRouter)


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
        channel = await channel_to(before)
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
        channel = await channel_to(after)
        assert channel.epoch == after.epoch
        channel.send(submit("stale", before.epoch, 5))
        [refused] = [o for f in await frames(channel, "stale") for o in f.outputs]
        assert refused.error is not None and refused.error.code is ErrorCode.STALE_EPOCH
        assert len(await answer(channel, submit("fresh", after.epoch, 30))) == 30
        await channel.close()
        await membership.close()


async def test_a_short_freeze_and_redis_away_change_nothing(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "nano", "llama", "nano")
    async with redis_for_tests() as redis, worker(redis, model) as process:
        membership = Membership(redis.url)
        before = await ready(membership)
        await redis.stop()
        await asyncio.sleep(LEASE_S + 1)
        await redis.start()
        assert (await ready(membership)).epoch == before.epoch
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)

        # SIGTERM: what it has is finished, then it leaves.
        channel = await channel_to(before)
        waiting = asyncio.create_task(answer(channel, submit("long", before.epoch, 900)))
        async with asyncio.timeout(30):
            while not metrics(before.host, before.http_port)["running"]:
                await asyncio.sleep(0)
        process.send_signal(signal.SIGTERM)
        assert len(await waiting) == 900
        assert await process.wait() == 0
        assert await membership.workers() == []
        await channel.close()
        await membership.close()
