"""One incarnation of one worker: the channel to it, what was submitted over it, its load.

A link owns the legs submitted over it until they answer for the last time; when it goes, each of
them is told once.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdserve.cluster.channel import Channel
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.protocol.errors import ErrorCode, ProtocolError, RequestError, WorkerError
from pdserve.protocol.measures import Measures
from pdserve.protocol.messages import (
    Abort,
    Alive,
    Continue,
    FinishReason,
    Output,
    StepFrame,
    Submit,
    WorkerStatus,
)
from pdserve.router.breaker import Breaker
from pdserve.router.placement import WorkerLoad

log = logging.getLogger(__name__)

EXCUSE_S = 3.0
"""A worker that speaks may be without a record for so long, from the moment that this is seen."""
SPEAKS_S = 1.0
"""It speaks if something came within so long: two heartbeats."""


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
        self.heard_at = self._used_at = time.monotonic()
        self._missing_at: float | None = None
        """When its record was first seen to be gone."""
        self.status: WorkerStatus | None = record.status
        self.measures: Measures | None = None
        """Of its last heartbeat."""
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

    def idle_s(self, now: float) -> float:
        """How long it has been without a submission."""
        if self._legs:
            self._used_at = now
        return now - self._used_at

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
        self._used_at = time.monotonic()
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
        if frame.measures is not None:
            self.measures = frame.measures
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


def final_error(request_id: str, error: WorkerError) -> Output:
    """An error in the shape of a last output."""
    return Output(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)
