"""The workers as this router sees them: who is there, one channel to each, how loaded they are.

`WorkerPool` follows Redis and keeps one `WorkerLink` per live incarnation of a worker:

    listed, ready ──► connecting ──► connected ──(channel ends, other epoch, lease lost)──► gone
                         ▲   │ fails: back-off, while it is still listed
                         └───┘

With more than MOST_CHANNELS workers a link is made when a request wants it, and ends when it has
had none for IDLE_S: so channels and heartbeats are as many as there is traffic, not as many as
there are pairs of routers and workers. Loads of workers without a link are looked up in Redis now
and then (`survey.py`), for admission; choices are made over Redis' own numbers.

When Redis is away the last view stands and running requests go on. A worker
whose lease has run out gets nothing new (unless Redis may have lost its memory, see `excused`), and
is given up once it is silent as well.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

from pdserve.cluster.channel import Channel, connect
from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.placement import LoadReport
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.messages import (
    ToRouter,
)
from pdserve.router.breaker import Breaker
from pdserve.router.link import EXCUSE_S, WorkerLink
from pdserve.router.placement import WorkerLoad
from pdserve.router.survey import SURVEY_S, Survey, sample, unlinked

log = logging.getLogger(__name__)

REFRESH_S = 0.25
"""Seconds between two looks at Redis."""
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
SILENCE_S = 2.0
"""A worker without a lease is given up after so many seconds without a frame."""
CONNECT_TIMEOUT_S = 5.0
BEAT_S = 1.0
"""Workers hear so often that this router lives."""
MOST_CHANNELS = 64
"""With so many workers there is a channel to each of them all the time."""
IDLE_S = 5.0
"""With more, a channel without a request is closed after so long."""
SPARE_BREAKERS = 256
"""Workers that are gone whose failures are remembered, in case that they come back."""


Reports = Callable[[Mapping[str, int]], Awaitable[Mapping[str, LoadReport]]]


class WorkerPool:
    """All live workers. `async with`, or `start()` and `close()`."""

    def __init__(
        self,
        membership: Membership,
        *,
        secret: str,
        name: str,
        refresh_s: float = REFRESH_S,
        silence_s: float = SILENCE_S,
        reports: Reports | None = None,
    ) -> None:
        """`reports(worker → epoch)`: the loads that they last reported; may raise
        RedisUnavailable. Without it, workers without a link count as idle."""
        self._membership = membership
        self._reports = reports
        self._survey = Survey()
        self._rng = random.Random()
        self._secret = secret
        self.name = name
        """Of this router."""
        self._refresh_s = refresh_s
        self._silence_s = silence_s
        self._lonely: set[tuple[str, int]] = set()
        """Prefill workers, by name and epoch, from whom nobody can fetch."""
        self._records: dict[str, WorkerRecord] = {}
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._listeners: list[Callable[[], None]] = []
        self._wanted: dict[str, list[Callable[[], None]]] = {}
        """By worker id: who waits for a link that is being made."""
        self._breakers: dict[str, Breaker] = {}
        self.version = 0
        """Grows whenever `snapshot` may name other workers, or the same ones with other roles;
        loads do not count."""
        self._missed: Mapping[str, WorkerRecord] = {}
        """As known before Redis lost its memory."""
        self._missed_until = 0.0
        self._longest: tuple[int, int | None] = (0, None)
        """As of that version: `max_model_len`."""
        self.loading = False
        """Some worker is on its way."""
        self.redis_error: str | None = None
        """Why the last look at Redis failed; None if it did not."""

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        work = [self._watch(), self._beat(), self._look_around()]
        self._watchers = [asyncio.create_task(one) for one in work]

    async def close(self) -> None:
        """Close all channels. Legs that still wait are told that their worker is lost."""
        tasks = [*self._tasks.values(), *self._watchers]
        self._watchers = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._membership.close()

    def on_change(self, listener: Callable[[], None]) -> None:
        """`listener` is called whenever a worker may have become placeable."""
        self._listeners.append(listener)

    @property
    def links(self) -> list[WorkerLink]:
        return list(self._links.values())

    def link(self, worker_id: str) -> WorkerLink | None:
        return self._links.get(worker_id)

    def load(self, worker_id: str) -> WorkerLoad | None:
        """That of a connected worker."""
        link = self._links.get(worker_id)
        return link.load() if link is not None else None

    @property
    def on_demand(self) -> bool:
        """Whether links are made when they are wanted."""
        return len(self._records) > MOST_CHANNELS

    def reach(self, worker_id: str, then: Callable[[], None]) -> None:
        """Call `then` as soon as there is a link, or none can be had: mostly at once."""
        record = self._records.get(worker_id)
        ready = record is not None and record.state is WorkerState.READY
        if record is None or not ready or worker_id in self._links or not self.on_demand:
            then()
        else:
            self._wanted.setdefault(worker_id, []).append(then)
            self._attend_to(record)

    def _settle(self, worker_id: str) -> None:
        """There is a link, or there will be none."""
        for then in self._wanted.pop(worker_id, ()):
            try:
                then()
            except Exception:  # nobody else may suffer for it
                log.exception("What waited for %s could not go on", worker_id)

    @property
    def waiting(self) -> int:
        """Requests not yet started, of all routers; on workers without a link, as last seen."""
        found = sum(link.status.waiting for link in self._links.values() if link.status)
        return found + (self._survey.waiting if self.on_demand else 0)

    def snapshot(self) -> list[WorkerLoad]:
        """The workers that may get new work, for placement and admission."""
        found = [link.load() for link in self._links.values() if link.placeable]
        if self.on_demand:
            found += [
                self._survey.load_of(record, self._breaker(record.worker_id).shuns)
                for record in unlinked(self._records.values(), self._links)
            ]
        return found

    def max_model_len(self) -> int | None:
        """What every worker accepts, in tokens; None without workers."""
        version, longest = self._longest
        if version != self.version:
            records = [link.record for link in self._links.values()]
            if self.on_demand:
                records += self._records.values()
            lengths = [record.model.max_model_len for record in records if record.model]
            longest = min(lengths, default=None)
            self._longest = self.version, longest
        return longest

    async def _watch(self) -> None:
        """Follow Redis for ever."""
        while True:
            try:
                records = await self._membership.follow()
            except RedisUnavailable as error:
                if self.redis_error is None:
                    log.warning("%s Going on with the last view of the cluster.", error)
                self.redis_error = str(error)
            else:
                if self.redis_error is not None:
                    log.info("Redis answers again")
                self.redis_error = None
                self._take_view(self._with_missed(records))
            await asyncio.sleep(self._refresh_s)

    def _with_missed(self, records: Mapping[str, WorkerRecord]) -> Mapping[str, WorkerRecord]:
        """What was read, and, when Redis may have lost its memory, for a while what was known: who
        has a link is judged by that, of the others nobody can tell."""
        now = time.monotonic()
        if self._membership.began_anew and self.on_demand:
            self._missed, self._missed_until = self._records, now + EXCUSE_S
        return {**self._missed, **records} if now < self._missed_until else records

    async def _beat(self) -> None:
        """Tell all workers that this router lives, and let go of those without work, for ever."""
        while True:
            now = time.monotonic()
            for link in self.links:
                if self.on_demand and link.idle_s(now) > IDLE_S:
                    self._give_up(link)
                else:
                    link.show_life()
            await asyncio.sleep(BEAT_S)

    async def _look_around(self) -> None:
        """Know what workers without a link have to do, for ever."""
        while True:
            if self.on_demand and self._reports is not None:
                meant = unlinked(self._records.values(), self._links)
                chosen = sample(meant, self._rng)
                try:
                    found = await self._reports({one.worker_id: one.epoch for one in chosen})
                except RedisUnavailable as error:
                    log.debug("The last view of the loads stands: %s", error)
                else:
                    self._survey = Survey(found, of=len(meant))
            await asyncio.sleep(SURVEY_S)

    def _take_view(self, records: Mapping[str, WorkerRecord]) -> None:
        before, self._records = self._records, {
            worker_id: record
            for worker_id, record in records.items()
            if record.port and _serves(record)
        }  # fmt: skip
        self.loading = any(record.state is WorkerState.LOADING for record in records.values())
        if len(self._breakers) > len(records) + SPARE_BREAKERS:
            self._breakers = {id_: one for id_, one in self._breakers.items() if id_ in records}
        if self._records != before:
            self._change()
            self._name_lonely()
        for link in self.links:
            record = self._records.get(link.worker_id)
            if record is None or record.epoch != link.epoch:
                if record is None and link.excused:
                    continue
                if link.listed:
                    link.withdraw()
                if record is not None or time.monotonic() - link.heard_at > self._silence_s:
                    self._give_up(link)
            elif link.follow(record):
                self._tell_listeners()
        if self.on_demand and self._records.keys() - before.keys():
            self._tell_listeners()
        elif not self.on_demand:
            for record in self._records.values():
                self._attend_to(record)

    def _name_lonely(self) -> None:
        """Say of each prefill worker, once, that nobody here can fetch what it holds."""
        ready = [one for one in self._records.values() if one.state is WorkerState.READY]
        takers = {r.model.fingerprint for r in ready if r.model and r.role is not Role.PREFILL}
        lonely = {
            (one.worker_id, one.epoch)
            for one in ready
            if one.role is Role.PREFILL and one.model and one.model.fingerprint not in takers
        }
        for worker_id, _ in lonely - self._lonely if takers else ():
            log.warning(
                "No decode worker can fetch KV blocks from %s: model, weights or cache layout "
                "differ (--dtype, --kv-cache-dtype, --batch-invariant, --kv-convert). It gets "
                "no prompts.",
                worker_id,
            )
        self._lonely = lonely if takers else set()

    def _attend_to(self, record: WorkerRecord) -> None:
        key = (record.worker_id, record.epoch)
        if self._watchers and record.state is WorkerState.READY and key not in self._tasks:
            task = asyncio.create_task(self._attend(record))
            self._tasks[key] = task
            task.add_done_callback(functools.partial(self._forget_task, key))

    def _forget_task(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)
        record = self._records.get(key[0])
        if task.cancelled() and record is not None and self._wanted.get(key[0]):
            self._attend_to(record)  # it was let go of in the moment when it was wanted again
        if key not in self._tasks:
            self._settle(key[0])
        if not task.cancelled() and task.exception() is not None:
            log.error("The link to %s failed", key[0], exc_info=task.exception())

    def _tell_listeners(self) -> None:
        for listener in self._listeners:
            listener()

    def _give_up(self, link: WorkerLink) -> None:
        task = self._tasks.get((link.worker_id, link.epoch))
        if task is not None:
            task.cancel()

    def _is_current(self, record: WorkerRecord) -> bool:
        newest = self._records.get(record.worker_id)
        return newest is not None and newest.epoch == record.epoch

    async def _attend(self, record: WorkerRecord) -> None:
        """Keep a channel to one incarnation of a worker for as long as it is listed; on demand:
        have one for as long as it is wanted."""
        backoff = FIRST_BACKOFF_S
        while self._is_current(record):
            try:
                channel = await connect(
                    record.host,
                    record.port,
                    secret=self._secret,
                    name=self.name,
                    receives=ToRouter,
                    timeout_s=CONNECT_TIMEOUT_S,
                )
            except (ConnectionError, ProtocolError) as error:
                log.warning("Cannot reach %s: %s", record.worker_id, error)
                if self.on_demand:
                    self._breaker(record.worker_id).loss()
            else:
                if await self._converse(record, channel):
                    backoff = FIRST_BACKOFF_S
            self._settle(record.worker_id)
            if self.on_demand:
                return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF_S)

    def adopt(self, record: WorkerRecord, channel: Channel) -> WorkerLink:
        """Send work to that incarnation over its channel from now on."""
        breaker = self._breaker(record.worker_id)
        link = WorkerLink(record, channel, breaker, self._link_change)
        self._links[record.worker_id] = link
        self._link_change()
        log.info("Connected to %s (%s, epoch %d)", link.worker_id, link.role, link.epoch)
        self._settle(record.worker_id)
        self._tell_listeners()
        return link

    def _link_change(self) -> None:
        if not self.on_demand:  # else a worker may be chosen with or without a link
            self._change()

    def _breaker(self, worker_id: str) -> Breaker:
        breaker = self._breakers.get(worker_id)
        if breaker is None:
            breaker = self._breakers[worker_id] = Breaker(changed=self._change)
        return breaker

    def _change(self) -> None:
        self.version += 1

    async def _converse(self, record: WorkerRecord, channel: Channel) -> bool:
        """Hand frames to their legs until the channel ends. False if a stranger answered."""
        if (channel.peer, channel.epoch) != (record.worker_id, record.epoch):
            log.warning(
                "%s epoch %d answers at the address of %s epoch %d",
                channel.peer,
                channel.epoch,
                record.worker_id,
                record.epoch,
            )
            await channel.close()
            return False
        link = self.adopt(record, channel)
        try:
            async for frame in channel:
                link.receive(frame)
        finally:
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]
            log.warning("Lost %s (%s, epoch %d)", link.worker_id, link.role, link.epoch)
            link.fail(f"The worker {link.worker_id} was lost while it held the request.")
            await asyncio.shield(channel.close())
        return True


def _serves(record: WorkerRecord) -> bool:
    return record.state in (WorkerState.READY, WorkerState.DRAINING)
