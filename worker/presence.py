"""A worker's own record in Redis: published, renewed, and taken back at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.records import WorkerRecord

log = logging.getLogger(__name__)

LEASE_S = 2.5
"""A worker that stops renewing is out within 3 s, the routers' looking included."""
RENEW_S = 0.8


class Presence:
    """Keeps one record alive. Redis may go away for a while: the worker works on regardless."""

    def __init__(
        self, membership: Membership, record: WorkerRecord, proof_of_life: Callable[[], bool]
    ) -> None:
        self._membership = membership
        self._proof_of_life = proof_of_life
        self._changed = asyncio.Event()
        self._reachable = True
        self._left = False
        self._writing = asyncio.Lock()
        """Taken for every change in Redis, so that the last word is the one meant to be."""
        self.record = record
        self.fenced = asyncio.Event()
        """Set when a newer incarnation of this worker has registered: this one must end."""

    def update(self, **changes: object) -> None:
        """Change the record; it is published at once."""
        self.record = msgspec.structs.replace(self.record, **changes)
        self._changed.set()

    def note(self, **changes: object) -> None:
        """Change the record; it is published with the next renewal."""
        self.record = msgspec.structs.replace(self.record, **changes)

    async def run(self) -> None:
        """Publish and renew until cancelled. The lease is renewed only while the worker proves
        that it makes progress."""
        while not self.fenced.is_set() and not self._left:
            if self._proof_of_life():
                async with self._writing:
                    if not self._left:
                        await self._publish()
            # asyncio.timeout, as Python 3.11's wait_for may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._changed.wait()
            self._changed.clear()

    async def _publish(self) -> None:
        try:
            if not await self._membership.publish(self.record, LEASE_S):
                log.error("A newer incarnation of %s has registered.", self.record.worker_id)
                self.fenced.set()
        except RedisUnavailable as error:
            if self._reachable:
                log.warning("%s The worker goes on and tries again.", error)
            self._reachable = False
        else:
            if not self._reachable:
                log.info("Redis is back.")
            self._reachable = True

    async def leave(self) -> None:
        """Take the record out for good, if Redis is there; else the lease runs out by itself.
        Idempotent."""
        if self._left:
            return
        self._left = True
        try:
            async with self._writing:
                await self._membership.remove(self.record.worker_id, self.record.epoch)
        except RedisUnavailable as error:
            log.warning("%s The record will expire.", error)
