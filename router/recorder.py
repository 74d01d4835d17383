"""Writes requests' stories to Redis, off their path.

Generation ─ends─► note (bytes in memory) ─┐
Generations that run ─every FLUSH_S──────────┴─► one round trip ─► Redis; away: dropped and counted
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from pdserve.cluster.journal import Journal, Note, Record
from pdserve.cluster.membership import RedisUnavailable
from pdserve.router.story import encoded

log = logging.getLogger(__name__)

FLUSH_S = 0.5
"""A request that runs for longer has a record while it runs."""
MAX_NOTES = 1000
"""Records that wait to be written; more are dropped."""
BATCH = 100
"""Records that travel together."""


class Storied(Protocol):
    """A request that can be told of."""

    def progress_mark(self) -> object:
        """Something that changes whenever there is news worth a new record."""

    def record(self) -> Record:
        """Its story so far."""


class Recorder:
    """One router's records. Event loop only; `note`, `begin` and `end` never wait."""

    def __init__(self, journal: Journal, count_dropped: Callable[[int], None]) -> None:
        self._journal = journal
        self._count_dropped = count_dropped
        self._notes: list[Note] = []
        self._running: dict[Storied, object] = {}
        """With the mark of the record that was written last."""
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write what there is, within the journal's time limit."""
        self._closing = True  # the Redis client may swallow a cancellation
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self.flush()
        await self._journal.close()

    def begin(self, request: Storied) -> None:
        """Keep an eye on a request until its `end`."""
        self._running[request] = None

    def end(self, request: Storied) -> None:
        """Note its last record."""
        if request in self._running:
            del self._running[request]
            self._note(request)

    def _note(self, request: Storied) -> None:
        if len(self._notes) >= MAX_NOTES:
            self._count_dropped(1)
            return
        try:
            record = request.record()
            text = encoded(record)
        except Exception:  # nobody's answer may suffer for it
            log.exception("The story of a request could not be told")
            text = None
        if text is None:
            self._count_dropped(1)
        else:
            self._notes.append(Note((record.id, record.request_id), text))

    async def _run(self) -> None:
        while not self._closing:
            await asyncio.sleep(FLUSH_S)
            for request, told in list(self._running.items()):
                mark = request.progress_mark()
                if mark != told:
                    self._running[request] = mark
                    self._note(request)
            await self.flush()

    async def flush(self) -> None:
        """Write all notes; those that cannot be written are dropped."""
        notes, self._notes = self._notes, []
        while notes:
            batch, rest = notes[:BATCH], notes[BATCH:]
            try:
                await self._journal.write(batch)
            except RedisUnavailable as error:
                log.debug("%d records of requests are dropped: %s", len(notes), error)
                self._count_dropped(len(notes))
                return
            notes = rest
