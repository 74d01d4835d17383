"""Tells Redis which prefixes the worker's cache holds, and how loaded it is.

    engine thread ─► StepOutcome.news ─► RouterService (event loop) ─► Reporter ─batches─► Redis

Changes are gathered for BATCH_S and sent in one script. The reporter remembers what the cache holds
(a route hash per few blocks), so a rebuild costs the engine nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.placement import UNKNOWN, LoadReport, Placement
from pdserve.protocol.messages import WorkerStatus

log = logging.getLogger(__name__)

BATCH_S = 0.05
"""Changes of so long travel together."""
IDLE_S = 1.0
"""A report is due after so long even if nothing changed: it keeps what Redis knows alive."""


class Reporter:
    """One worker incarnation's reports. Event loop only."""

    def __init__(self, placement: Placement, worker_id: str, epoch: int, block_size: int) -> None:
        self._placement = placement
        self._worker_id = worker_id
        self._epoch = epoch
        self._block_size = block_size
        self._held: set[bytes] = set()
        self._changes: dict[bytes, bool] = {}
        self._load = LoadReport(0, 0, UNKNOWN)
        self._number = 0
        self._whole = True
        """Redis does not know, or may not know, everything: send the whole set."""
        self._dirty = asyncio.Event()

    def note(self, status: WorkerStatus, news: dict[bytes, bool]) -> None:
        """What a step brought."""
        for route, stored in news.items():
            (self._held.add if stored else self._held.discard)(route)
        self._changes.update(news)
        room = (status.blocks_free + status.blocks_cached) * self._block_size
        requests = status.running + status.waiting + status.fetching
        load = LoadReport(status.queued_tokens, requests, room, status.waiting)
        if news or load != self._load:
            self._load = load
            self._dirty.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await self._send()
            await asyncio.sleep(BATCH_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._dirty.wait()

    async def _send(self) -> None:
        """One batch; after a gap, everything."""
        self._dirty.clear()
        changes, self._changes = self._changes, {}
        self._number += 1
        try:
            if not self._whole:
                stored = [route for route, here in changes.items() if here]
                removed = [route for route, here in changes.items() if not here]
                self._whole = not await self._placement.report(
                    self._worker_id, self._epoch, self._number, self._load, stored, removed
                )
            if self._whole:
                # What changes while this travels is in the next batch.
                everything, self._changes = list(self._held), {}
                await self._placement.report(
                    self._worker_id, self._epoch, self._number, self._load, everything, whole=True
                )
                self._whole = False
        except RedisUnavailable as error:
            if not self._whole:
                log.info("%s The prefixes are reported anew when it is back.", error)
            self._whole = True

    def begin(self, epoch: int) -> None:
        """Report as another incarnation; the cache is the same."""
        self._epoch, self._number, self._whole = epoch, 0, True
        self._dirty.set()

    async def leave(self) -> None:
        """Take everything back, if Redis is there; else it expires."""
        with contextlib.suppress(RedisUnavailable):
            await self._placement.leave(self._worker_id, self._epoch)
