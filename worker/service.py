"""The worker's side of its channels with routers: requests in, one frame per step out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from pdserve.cluster.channel import Channel
from pdserve.cluster.requests import ROUTER_LEASE_S
from pdserve.engine.grammar import Matcher
from pdserve.engine.loop import Engine, StepOutcome
from pdserve.protocol.errors import ErrorCode, ProtocolError, WorkerError
from pdserve.protocol.measures import Measures
from pdserve.protocol.messages import (
    Abort,
    Alive,
    Continue,
    FinishReason,
    Output,
    StepFrame,
    Submit,
    ToWorker,
    WorkerStatus,
)
from pdserve.protocol.orders import Order, OrderDone
from pdserve.worker.departure import Remains
from pdserve.worker.grammars import Compiling

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.1
"""Routers that got nothing in a step hear of the load at most this often."""
HEARTBEAT_S = 0.5
"""And at least this often even if nothing has changed: so they know that the worker lives."""

OnOrder = Callable[[Order, Callable[[OrderDone], None]], None]
"""Carries an order out; the second argument takes the answer, now or later."""


class RouterService:
    """Hands messages to the engine and the engine's steps to the routers. Event loop only, but for
    `sink`, which the engine thread calls."""

    def __init__(
        self,
        epoch: int,
        traffic: Callable[[], tuple[int, int, int]],
        alive: Callable[[], bool] = lambda: True,
        router_lease_s: float = ROUTER_LEASE_S,
        measures: Callable[[], Measures | None] = lambda: None,
    ) -> None:
        """`traffic()`: KV bytes (in, out, out early) so far. `alive()`: whether the engine makes
        progress; only then are there heartbeats. `measures()`: what these tell besides."""
        self._measures = measures
        self._router_lease_s = router_lease_s
        self._heard: dict[Channel, float] = {}
        """When something last came over a router's channel."""
        self._epoch = epoch
        self._traffic = traffic
        self._alive = alive
        self._loop = asyncio.get_running_loop()
        self._channels: dict[Channel, WorkerStatus | None] = {}
        self._engine: Engine | None = None
        self._note: Callable[[WorkerStatus, dict[bytes, bool]], None] | None = None
        self._on_order: OnOrder | None = None
        self._draining = False
        self._compiling: Compiling | None = None
        self._moved = (0, 0, 0)
        self._step = 0
        self._status: WorkerStatus | None = None
        self._status_timer: asyncio.TimerHandle | None = None
        self._beat_at = 0.0

    @property
    def status(self) -> WorkerStatus | None:
        """The load after the last step."""
        return self._status

    def attach(
        self,
        engine: Engine,
        note: Callable[[WorkerStatus, dict[bytes, bool]], None] | None = None,
        on_order: OnOrder | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        """`note(status, news)` hears, on the event loop, what each step has brought the cache;
        without `on_order` this worker takes no orders, without `compiling` no requests with a
        constraint."""
        self._engine = engine
        self._note = note
        self._on_order = on_order
        self._compiling = compiling

    def begin(self, epoch: int) -> None:
        """Serve as another incarnation; whoever closes the channels ends what came over them."""
        self._epoch = epoch

    def drain(self) -> None:
        """From now on refuse submissions, and say so in every status."""
        self._draining = True
        self._beat_at = 0.0
        if self._status_timer is not None:
            self._status_timer.cancel()
        self._send_status()

    async def remains(self, within_s: float) -> Remains:
        """What the engine has, everything that was submitted until now included. If it is in the
        middle of a step for longer than `within_s`: what it had before, at least one request."""
        assert self._engine is not None
        answer: asyncio.Future[WorkerStatus] = self._loop.create_future()

        def ask(engine: Engine) -> None:
            self._loop.call_soon_threadsafe(_settle, answer, engine.status())

        compiling = len(self._compiling) if self._compiling is not None else 0
        self._engine.call(ask)
        await asyncio.wait([answer], timeout=within_s)
        status = answer.result() if answer.done() else self._status
        requests = status.running + status.waiting + status.fetching if status else 0
        requests += compiling
        if not answer.done():
            requests = max(1, requests)
        return Remains(requests, status.tickets if status else 0)

    def sink(self, outcome: StepOutcome) -> None:
        """Called by the engine thread once per step, or twice; one wake-up, whatever it brought."""
        self._loop.call_soon_threadsafe(self._deliver, outcome)

    async def on_channel(self, channel: Channel) -> None:
        """Serve one router until it leaves; what it left behind is aborted."""
        assert self._engine is not None
        self._channels[channel] = None
        self._schedule_status()
        log.info("Router %s connected.", channel.peer)
        try:
            async for message in channel:
                self._receive(channel, message)
        finally:
            del self._channels[channel]
            self._heard.pop(channel, None)
            if self._compiling is not None:
                self._compiling.forget(channel)
            self._engine.abort_client(channel)
            log.info("Router %s left.", channel.peer)

    def _receive(self, channel: Channel, message: ToWorker) -> None:
        assert self._engine is not None
        if message.epoch != self._epoch:
            text = f"This is for epoch {message.epoch}; this worker is {self._epoch}."
            self._refuse(channel, message, ErrorCode.STALE_EPOCH, text)
        elif isinstance(message, Abort):
            if self._compiling is not None:
                self._compiling.forget(channel, message.request_id)
            self._engine.abort(message.request_id)
        elif isinstance(message, Alive):
            self._heard[channel] = self._loop.time()
        elif isinstance(message, Continue):
            if self._compiling is None or not self._compiling.hold(channel, message):
                self._engine.resume(message)
        elif isinstance(message, Submit):
            self._heard[channel] = self._loop.time()
            if self._draining:
                text = "This worker is leaving and takes nothing new."
                self._refuse(channel, message, ErrorCode.DRAINING, text)
            elif message.sampling.constraint is not None:
                self._compile(channel, message)
            else:
                self._engine.submit(message, channel)
        elif self._on_order is not None:
            self._on_order(message, lambda done: self._answer(channel, done))
        else:
            self._refuse(channel, message, ErrorCode.INVALID_REQUEST, "It takes no orders.")

    def _refuse(self, channel: Channel, message: ToWorker, code: ErrorCode, text: str) -> None:
        if isinstance(message, Submit):
            self._send(channel, [_failed(message.request_id, code, text)])
        elif not isinstance(message, Abort | Alive | Continue):
            self._answer(channel, OrderDone(error=WorkerError(code=code, message=text)))

    def _answer(self, channel: Channel, done: OrderDone) -> None:
        try:
            channel.send(done)
        except ConnectionError as error:
            log.warning("Operator %s: %s", channel.peer, error)

    def _compile(self, channel: Channel, message: Submit) -> None:
        """Make the request's matcher first; an abort that comes meanwhile ends it."""
        engine = self._engine
        assert engine is not None

        def failed(text: str) -> None:
            self._send(channel, [_failed(message.request_id, ErrorCode.INVALID_REQUEST, text)])

        if self._compiling is None:
            failed("This worker cannot constrain what it draws.")
            return

        def done(submit: Submit, matcher: Matcher, continued: Continue | None) -> None:
            engine.submit(submit, channel, matcher)
            if continued is not None:
                engine.resume(continued)

        self._compiling.start(channel, message, done, failed)

    def _deliver(self, outcome: StepOutcome) -> None:
        self._step = outcome.step
        self._status = self._with_traffic(outcome.status)
        for client, outputs in outcome.outputs.items():
            if client in self._channels:
                assert isinstance(client, Channel)
                self._send(client, outputs)
        self._schedule_status()
        if self._note is not None:
            self._note(self._status, outcome.news)

    def _schedule_status(self) -> None:
        soon = self._loop.time() + STATUS_INTERVAL_S
        if self._status_timer is not None and self._status_timer.when() > soon:
            self._status_timer.cancel()
            self._status_timer = None
        if self._status_timer is None:
            self._status_timer = self._loop.call_later(STATUS_INTERVAL_S, self._send_status)

    def _send_status(self) -> None:
        """To whoever has not heard of the last step, or, as a heartbeat, to all."""
        now = self._loop.time()
        beat = now - self._beat_at >= HEARTBEAT_S
        if beat:
            self._beat_at = now
        self._status_timer = None
        if self._channels:
            self._status_timer = self._loop.call_later(HEARTBEAT_S, self._send_status)
        for channel, heard_at in list(self._heard.items()):
            if now - heard_at > self._router_lease_s:
                log.warning("Router %s has said nothing for too long.", channel.peer)
                channel.abort()
        self._moved = self._traffic()
        if self._status is not None:
            self._status = self._with_traffic(self._status)
        if not self._alive():
            return
        measures = self._measures() if beat else None
        for channel, told in list(self._channels.items()):
            if beat or told is not self._status:
                self._send(channel, [], measures)

    def _with_traffic(self, status: WorkerStatus) -> WorkerStatus:
        bytes_in, bytes_out, early = self._moved
        return msgspec.structs.replace(
            status,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            bytes_early=early,
            draining=self._draining,
        )

    def _send(
        self, channel: Channel, outputs: list[Output], measures: Measures | None = None
    ) -> None:
        frame = StepFrame(
            epoch=self._epoch,
            step=self._step,
            outputs=outputs,
            status=self._status,
            measures=measures,
        )
        self._channels[channel] = self._status
        try:
            channel.send(frame)
        except ConnectionError as error:
            log.warning("Router %s: %s", channel.peer, error)
        except ProtocolError as error:
            self._split(channel, outputs, error)

    def _split(self, channel: Channel, outputs: list[Output], error: ProtocolError) -> None:
        """The frame is too long: send each output by itself, and an error for the one at fault."""
        if len(outputs) > 1:
            for output in outputs:
                self._send(channel, [output])
        elif outputs:
            assert self._engine is not None
            log.error("%s: %s", outputs[0].request_id, error)
            self._engine.abort(outputs[0].request_id)
            self._send(channel, [_failed(outputs[0].request_id, ErrorCode.INTERNAL, str(error))])


def _settle(answer: asyncio.Future[WorkerStatus], status: WorkerStatus) -> None:
    if not answer.done():
        answer.set_result(status)


def _failed(request_id: str, code: ErrorCode, text: str) -> Output:
    return Output(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error=WorkerError(code=code, message=text),
    )
