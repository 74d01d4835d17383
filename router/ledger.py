"""The requests that this router carries: told to all in Redis, and ended when somebody asks.

Generation ─carry─► Ledger ─heartbeat each BEAT_S, all records in one script─► Redis
                       ▲                                                         │
                       └──────────── ids that other routers were asked to end ◄──┘
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.requests import RequestRecord, RequestRecords

log = logging.getLogger(__name__)

BEAT_S = 0.5


class Carried(Protocol):
    """A request in flight."""

    def request_record(self) -> RequestRecord:
        """Where it is now."""

    def abort(self) -> None:
        """End it as it is."""


class InLine:
    """A request that waits for its turn."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._ended = asyncio.Event()

    @property
    def aborted(self) -> bool:
        return self._ended.is_set()

    def abort(self) -> None:
        self._ended.set()

    def request_record(self) -> RequestRecord:
        return self._record

    async def until(self, gone: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Ends when it is aborted, or `gone()` ends."""
        waits = [asyncio.create_task(gone()), asyncio.create_task(self._ended_at())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()

    async def _ended_at(self) -> None:
        await self._ended.wait()


class Ledger:
    """One router's requests in flight. Event loop only."""

    def __init__(self, records: RequestRecords, router: str) -> None:
        self._records = records
        self._router = router
        self._carried: dict[str, list[Carried]] = {}
        """By the ids of their answers, which clients may choose alike."""
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    @contextlib.contextmanager
    def carrying(self, answer_id: str, request: Carried) -> Iterator[None]:
        """It is in flight within this context."""
        same_id = self._carried.setdefault(answer_id, [])
        same_id.append(request)
        try:
            yield
        finally:
            same_id.remove(request)
            if not same_id:
                del self._carried[answer_id]

    async def abort(self, answer_ids: Sequence[str]) -> None:
        """End requests as they are, whichever router carries them; ids that are not in flight are
        ignored. Raises RedisUnavailable if the other routers cannot be told."""
        elsewhere = [one for one in dict.fromkeys(answer_ids) if not self._abort_here(one)]
        if elsewhere:
            await self._records.abort(elsewhere, by=self._router)

    def _abort_here(self, answer_id: str) -> bool:
        found = list(self._carried.get(answer_id, ()))
        for request in found:
            request.abort()
        return bool(found)

    async def beat(self) -> None:
        """One heartbeat. Raises RedisUnavailable."""
        carried = itertools.chain.from_iterable(self._carried.values())
        records = [request.request_record() for request in carried]
        for answer_id in await self._records.beat(self._router, records):
            log.info("%s is ended, as another router was asked to.", answer_id)
            self._abort_here(answer_id)

    async def _run(self) -> None:
        while not self._closing:
            try:
                await self.beat()
            except RedisUnavailable as error:
                log.debug("The records of running requests wait for Redis: %s", error)
            except Exception:  # nobody's answer depends on it
                log.exception("The records of running requests could not be written")
            await asyncio.sleep(BEAT_S)

    async def close(self) -> None:
        """Take the records back, if Redis is there; else they expire."""
        self._closing = True  # the Redis client may swallow a cancellation
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            with contextlib.suppress(RedisUnavailable):
                await self._records.leave(self._router)
        await self._records.close()
