"""A Redis of its own for a test: the one that `pdserve up` starts."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pdserve.cluster.process import Child, start, stop
from pdserve.cluster.redis_server import (
    PrivateRedis,
    private_folder,
    private_redis,
    until_answering,
)


class RedisForTests:
    """A private Redis that can be killed and started again under the same URL."""

    def __init__(self, private: PrivateRedis) -> None:
        self.url = private.url
        self._command = private.command
        self._child: Child | None = None

    async def start(self) -> None:
        self._child = start(self._command)
        await until_answering(self.url, self._child)

    async def stop(self) -> None:
        if self._child is not None:
            await stop([self._child], 2.0)


@asynccontextmanager
async def redis_for_tests() -> AsyncIterator[RedisForTests]:
    folder = private_folder("pdserve-test-")
    redis = RedisForTests(private_redis(folder, folder / "redis.log"))
    try:
        await redis.start()
        yield redis
    finally:
        await redis.stop()
        shutil.rmtree(folder)
