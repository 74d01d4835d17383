"""The workers as this router sees them: who is there, one channel to each, how loaded they are.

`WorkerPool` follows Redis and keeps one `WorkerLink` per live incarnation of a worker:

    listed, ready ──► connecting ──► connected ──(channel ends, other epoch, lease lost)──► gone
                         ▲   │ fails: back-off, while it is still listed
                         └───┘

A link owns the legs submitted over it until they answer for the last time; when it goes, each of
them is told once. When Redis is away the last view stands and running requests go on. A worker
whose lease has run out gets nothing new (unless Redis may have lost its memory, see `excused`), and
is given up once it is silent as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from pdserve.cluster.channel import Channel, connect
from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.protocol.errors import ErrorCode, ProtocolError, RequestError, WorkerError
from pdserve.protocol.messages import (
    Abort,
    Alive,
    Continue,
    FinishReason,
    Output,
    StepFrame,
    Submit,
    ToRouter,
    WorkerStatus,
)
from pdserve.router.breaker import Breaker
from pdserve.router.placement import WorkerLoad

log = logging.getLogger(__name__)

REFRESH_S = 0.25
"""Seconds between two looks at Redis."""
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
SILENCE_S = 2.0
"""A worker without a lease is given up after so many seconds without a frame."""
EXCUSE_S = 3.0
"""A worker that speaks may be without a record for so long, from the moment that this is seen."""
SPEAKS_S = 1.0
"""It speaks if something came within so long: two heartbeats."""
CONNECT_TIMEOUT_S = 5.0
BEAT_S = 1.0
"""Workers hear so often that this router lives."""
SPARE_BREAKERS = 256
"""Workers that are gone whose failures are remembered, in case that they come back."""


class Leg(Protocol):
    """One submission, as its link sees it."""

    def receive(self, output: Output) -> None:
        """An output of the worker, in order."""

    def lost(self, error: WorkerError) -> None:
        """The worker, or the way to it, is gone; nothing more will come. Called at most once."""


@dataclass(frozen=True, slots=True)
class _Charge:
    """What a submission adds to its worker's load until the worker's own numbers contain it."""

    compute: int
    """Tokens whose KV the worker has to compute (a ticket brings it along)."""
    room: int
    """Tokens that its blocks must hold."""
    born: int
    """Statuses that had come when it was sent."""


class WorkerLink:
    """One incarnation of one worker: its channel, its legs, its load."""

    def __init__(
        self,
        record: WorkerRecord,
        channel: Channel,
        breaker: Breaker | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`breaker`: that of the worker, whatever its incarnation. `changed()` is called when new
        work may go there that might not before, or the other way round."""
        self.record = record
        self.channel = channel
        self._breaker = breaker or Breaker()
        self._changed = changed
        self.listed = True
        """Its lease runs and it says that it is ready."""
        self.heard_at = time.monotonic()
        self._missing_at: float | None = None
        """When its record was first seen to be gone."""
        self.status: WorkerStatus | None = record.status
        self._statuses = 0
        self._charges: dict[str, _Charge] = {}
        self._legs: dict[str, Leg] = {}
        self._over = False

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    @property
    def role(self) -> Role:
        return self.record.role

    @property
    def epoch(self) -> int:
        return self.record.epoch

    @property
    def fingerprint(self) -> str:
        return self.record.model.fingerprint if self.record.model else ""

    @property
    def placeable(self) -> bool:
        """Whether new work may go there."""
        draining = self.status is not None and self.status.draining
        return self.listed and not draining and not self._over and not self.channel.closed

    @property
    def excused(self) -> bool:
        """Whether to overlook that its record is gone: it speaks, so Redis may have been restarted
        empty and it has not published itself again yet. Not for long."""
        now = time.monotonic()
        if self._missing_at is None:
            self._missing_at = now
        return now - self._missing_at < EXCUSE_S and now - self.heard_at < SPEAKS_S

    def follow(self, record: WorkerRecord) -> bool:
        """Take what the worker says of itself now; True if that changes whom to choose."""
        self._missing_at = None
        before = (self.listed, self.role)
        self.record = record
        self.listed = record.state is WorkerState.READY
        if (self.listed, self.role) == before:
            return False
        self._changed()
        return True

    def withdraw(self) -> None:
        """Send nothing new there until its record is read again."""
        self.listed = False
        self._changed()

    @property
    def legs(self) -> int:
        """Submissions of this router that have not ended."""
        return len(self._legs)

    @property
    def requests(self) -> int:
        """On the worker after its last step, of all routers."""
        status = self.status
        return status.running + status.waiting + status.fetching if status else 0

    def load(self) -> WorkerLoad:
        """The worker's own numbers plus what was sent since; a pure value for placement."""
        record, status, model = self.record, self.status, self.record.model
        queued, requests, taken = 0, len(self._charges), 0
        for charge in self._charges.values():
            queued += charge.compute
            taken += charge.room
        free: int | None = None
        if status is not None:
            requests += status.running + status.waiting + status.fetching
            queued += status.queued_tokens
            if model is not None:
                room = (status.blocks_free + status.blocks_cached) * model.block_size
                free = max(0, room - taken)
        return WorkerLoad(
            worker_id=record.worker_id,
            role=record.role,
            epoch=record.epoch,
            fingerprint=model.fingerprint if model else "",
            queued_tokens=queued,
            requests=requests,
            free_tokens=free,
            shunned=self._breaker.shuns,
        )

    def submit(self, message: Submit, leg: Leg) -> None:
        """Send a submission, charge it to the load; `leg` hears of it from now on.

        Raises RequestError(WORKER_LOST) if the channel has just closed.
        """
        try:
            self.channel.send(message)
        except (ConnectionError, ProtocolError) as error:
            raise RequestError(ErrorCode.WORKER_LOST, str(error)) from None
        self._breaker.sent()
        self._legs[message.request_id] = leg
        length = message.prompt_len + len(message.output_token_ids)
        compute = length if message.ticket is None else 0
        self._charges[message.request_id] = _Charge(compute, length, self._statuses)

    def resume(self, request_id: str, tokens: list[int]) -> None:
        """The first tokens of a request that was submitted with a growing ticket.

        Raises RequestError(WORKER_LOST) if the channel has just closed.
        """
        message = Continue(request_id=request_id, epoch=self.epoch, output_token_ids=tokens)
        try:
            self.channel.send(message)
        except ConnectionError as error:
            raise RequestError(ErrorCode.WORKER_LOST, str(error)) from None

    def abort(self, request_id: str) -> None:
        """End a request there, its outbox included; its leg hears nothing more. Never fails: a
        worker that is gone has nothing to end."""
        self._legs.pop(request_id, None)
        self._charges.pop(request_id, None)
        if not self.channel.closed:
            try:
                self.channel.send(Abort(request_id=request_id, epoch=self.epoch))
            except ConnectionError:
                log.debug("Abort of %s: %s is gone", request_id, self.worker_id)

    def show_life(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.channel.send(Alive(epoch=self.epoch))

    def receive(self, frame: StepFrame) -> None:
        """Hand a step's outputs to their legs; those of another epoch belong to nobody."""
        if frame.epoch != self.epoch:
            log.warning("Dropped a frame of %s from epoch %d", self.worker_id, frame.epoch)
            return
        self.heard_at = time.monotonic()
        if frame.status is not None:
            self._take_status(frame.status)
        for output in frame.outputs:
            leg = self._legs.get(output.request_id)
            if leg is None:
                continue  # aborted, and the abort is on its way
            self._charges.pop(output.request_id, None)
            moves_on = output.ticket is not None and not output.ticket.growing
            if output.finish_reason is not None or moves_on:
                del self._legs[output.request_id]
            if output.error is None:
                self._breaker.success()
            elif output.error.code is ErrorCode.INTERNAL:
                self._breaker.failure()
            leg.receive(output)

    def _take_status(self, status: WorkerStatus) -> None:
        """The worker's numbers replace the guesses. One status may have been on its way when a
        request was sent, the second one contains it."""
        if self.status is None or self.status.draining != status.draining:
            self._changed()
        self.status = status
        self._statuses += 1
        if self._charges:
            self._charges = {
                request_id: charge
                for request_id, charge in self._charges.items()
                if charge.born + 2 > self._statuses
            }

    def fail(self, reason: str) -> None:
        """Tell every leg that the worker is lost, once."""
        self._over = True
        self._changed()
        if self._legs:
            self._breaker.loss()
        legs, self._legs = self._legs, {}
        self._charges.clear()
        error = WorkerError(code=ErrorCode.WORKER_LOST, message=reason)
        for leg in legs.values():
            leg.lost(error)


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
    ) -> None:
        self._membership = membership
        self._secret = secret
        self.name = name
        """Of this router."""
        self._refresh_s = refresh_s
        self._silence_s = silence_s
        self._records: dict[str, WorkerRecord] = {}
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._listeners: list[Callable[[], None]] = []
        self._breakers: dict[str, Breaker] = {}
        self.version = 0
        """Grows whenever `snapshot` may name other workers, or the same ones with other roles;
        loads do not count."""
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
        self._watchers = [asyncio.create_task(self._watch()), asyncio.create_task(self._beat())]

    async def close(self) -> None:
        """Close all channels. Legs that still wait are told that their worker is lost."""
        tasks = [*self._tasks.values(), *self._watchers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watchers = []
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
    def waiting(self) -> int:
        """Requests not yet started, on all workers, of all routers."""
        return sum(link.status.waiting for link in self._links.values() if link.status)

    def snapshot(self) -> list[WorkerLoad]:
        """The workers that may get new work, for placement."""
        return [link.load() for link in self._links.values() if link.placeable]

    def max_model_len(self) -> int | None:
        """What every connected worker accepts, in tokens; None without workers."""
        lengths = [
            link.record.model.max_model_len for link in self._links.values() if link.record.model
        ]
        return min(lengths, default=None)

    async def _watch(self) -> None:
        """Follow Redis for ever."""
        while True:
            try:
                records = await self._membership.workers()
            except RedisUnavailable as error:
                if self.redis_error is None:
                    log.warning("%s Going on with the last view of the cluster.", error)
                self.redis_error = str(error)
            else:
                if self.redis_error is not None:
                    log.info("Redis answers again")
                self.redis_error = None
                self._take_view(records)
            await asyncio.sleep(self._refresh_s)

    async def _beat(self) -> None:
        """Tell all workers that this router lives, for ever."""
        while True:
            for link in self.links:
                link.show_life()
            await asyncio.sleep(BEAT_S)

    def _take_view(self, records: list[WorkerRecord]) -> None:
        self._records = {
            record.worker_id: record for record in records if record.port and _serves(record)
        }
        self.loading = any(record.state is WorkerState.LOADING for record in records)
        if len(self._breakers) > len(records) + SPARE_BREAKERS:
            ids = {record.worker_id for record in records}
            self._breakers = {id_: one for id_, one in self._breakers.items() if id_ in ids}
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
        for record in self._records.values():
            key = (record.worker_id, record.epoch)
            if record.state is WorkerState.READY and key not in self._tasks:
                task = asyncio.create_task(self._attend(record))
                self._tasks[key] = task
                task.add_done_callback(functools.partial(self._forget_task, key))

    def _forget_task(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)
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
        """Keep a channel to one incarnation of a worker for as long as it is listed."""
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
            else:
                if await self._converse(record, channel):
                    backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF_S)

    def adopt(self, record: WorkerRecord, channel: Channel) -> WorkerLink:
        """Send work to that incarnation over its channel from now on."""
        breaker = self._breakers.get(record.worker_id)
        if breaker is None:
            breaker = self._breakers[record.worker_id] = Breaker(changed=self._change)
        link = WorkerLink(record, channel, breaker, self._change)
        self._links[record.worker_id] = link
        self._change()
        log.info("Connected to %s (%s, epoch %d)", link.worker_id, link.role, link.epoch)
        self._tell_listeners()
        return link

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


def final_error(request_id: str, error: WorkerError) -> Output:
    """An error in the shape of a last output."""
    return Output(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)
