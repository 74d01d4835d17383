"""A worker's own record in Redis: published, renewed, and taken back at the end.

renewed each RENEW_S ──frozen until the lease was over─────────► lapsed ──`begin`──► renewed
      │  └──────────────engine stuck: the record is taken out───────┘
      └──a newer incarnation has registered──► fenced: this process must end
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.records import WorkerRecord, WorkerState

log = logging.getLogger(__name__)

LEASE_S = 2.5
"""A worker that stops renewing is out within 3 s, the routers' looking included."""
RENEW_S = 0.8
TICK_S = 0.1
FROZEN_S = 1.0
"""An event loop that comes around so late was not running: the process was stopped, or starved."""


class Presence:
    """Keeps one record alive. Redis may go away for a while: the worker works on regardless, and
    its lease is taken up again. But when the lease ran out because this process did not run,
    routers have moved its requests: it has `lapsed`, and is not renewed until it begins anew. So it
    has as soon as its engine makes no progress: then nobody has to wait for the lease's end."""

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
        self._renewed_at = self._seen_at = time.monotonic()
        """When a renewal that succeeded was asked for; when the event loop was last seen to run."""
        self._absent = False
        """Since the last renewal it was frozen for a while."""
        self._given_up = False
        """It has lapsed, and its record has been taken out."""
        self.record = record
        self.lapsed = False
        """The epoch is over; see `begin`."""
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
        """Publish and renew until cancelled, or take the record out, while the worker does not
        prove that it makes progress."""
        ticking = asyncio.create_task(self._tick())
        try:
            while not self.fenced.is_set() and not self._left:
                self._look()
                async with self._writing:
                    if self.lapsed:
                        await self._give_up()
                    elif not self._left and self._proof_of_life():
                        await self._publish()
                # asyncio.timeout, as Python 3.11's wait_for may swallow a cancellation.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RENEW_S):
                        await self._changed.wait()
                self._changed.clear()
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._look()

    def _look(self) -> None:
        """Notice that the process did not run, or that the engine does not; whoever runs first
        after that calls this."""
        now = time.monotonic()
        if self.record.state is WorkerState.LOADING:  # nobody has entrusted anything to it
            self._seen_at = self._renewed_at = now
            return
        self._absent |= now - self._seen_at > FROZEN_S
        self._seen_at = now
        if self.lapsed:
            return
        if not self._proof_of_life():
            log.warning("The engine makes no progress; the lease is given up.")
            self.lapsed = True
            self._changed.set()
        elif self._absent and now - self._renewed_at > LEASE_S:
            log.warning("The lease ran out %.1f s ago.", now - self._renewed_at - LEASE_S)
            self.lapsed = True

    async def _give_up(self) -> None:
        """Take the record of an epoch that is over out, once."""
        if self._left or self._given_up:
            return
        try:
            await self._membership.remove(self.record.worker_id, self.record.epoch)
            self._given_up = True
        except RedisUnavailable as error:
            log.warning("%s The record will expire.", error)

    async def _publish(self) -> None:
        asked_at = time.monotonic()
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
            self._renewed_at = asked_at
            self._look()
            self._absent &= self._seen_at - asked_at > FROZEN_S

    async def next_epoch(self) -> int | None:
        """For a worker that has lapsed: the epoch to `begin`; None if Redis does not answer, or if
        it is fenced because another incarnation has registered meanwhile."""
        record = self.record
        try:
            epoch = await self._membership.next_epoch(record.worker_id, after=record.epoch)
        except RedisUnavailable as error:
            log.warning("%s The worker cannot begin anew yet.", error)
            return None
        if not epoch:
            log.error("A newer incarnation of %s has registered.", record.worker_id)
            self.fenced.set()
        return epoch or None

    def begin(self, epoch: int) -> None:
        """Register again, as another incarnation."""
        self._renewed_at = self._seen_at = time.monotonic()
        self._absent = self._given_up = False
        self.lapsed = False
        self.update(epoch=epoch)

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
