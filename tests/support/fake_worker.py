"""A worker without an engine, for tests of routers: real channel, real membership, scripted tokens.

    async with FakeWorker(membership, Role.DECODE, script=...) as worker: ...

The answer to a submission is `script(submit)`, the same for whoever is asked, from the position
that the submission's `output_token_ids` have reached. Every step brings each running request one
token, in one frame per router.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from pdserve.cluster.channel import Channel, ChannelServer
from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.records import ModelInfo, Role, WorkerRecord, WorkerState
from pdserve.protocol import events
from pdserve.protocol.errors import ErrorCode, WorkerError
from pdserve.protocol.messages import (
    Abort,
    Continue,
    FinishReason,
    LifeEvent,
    Output,
    PositionLogprobs,
    StepFrame,
    Submit,
    ToWorker,
    WorkerStatus,
)
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint

SECRET = "tests"
LEASE_S = 2.5
BLOCKS = 1000
FINGERPRINT = LayoutFingerprint(
    model="fake",
    weights="0",
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=16,
)

Script = Callable[[Submit], list[int]]


@dataclass(eq=False)
class _Running:
    submit: Submit
    channel: Channel
    tokens: list[int]
    """What is still to be sent."""
    position: int
    sent: int = 0


@dataclass
class FakeWorker:
    """One incarnation. Everything below the line may be changed while it runs."""

    membership: Membership
    role: Role
    script: Script
    worker_id: str = ""
    max_model_len: int = 4096
    vocab_size: int = 2048
    # ----
    step_s: float = 0.0
    """Pause between two steps."""
    refuse: list[WorkerError] = field(default_factory=list)
    """The next submissions get these errors."""
    die_at: int | None = None
    """Die like a killed process once a request has got so many tokens here (0: on submission)."""
    pause_at: int | None = None
    """Clear `go` once a request has got so many tokens here."""
    on_death: Callable[[], None] = lambda: None
    """Called when it dies, on its event loop."""
    draining: bool = False
    early: bool = False
    """Give a growing ticket out before the first token."""
    preempted: bool = False
    """The ticket that comes with the first token is not the growing one."""
    continues: list[Continue] = field(default_factory=list)
    submits: list[Submit] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    _numbers = itertools.count()

    def __post_init__(self) -> None:
        self.worker_id = self.worker_id or f"{self.role}-{next(self._numbers)}"
        self.go = asyncio.Event()
        """Tokens flow while it is set."""
        self.go.set()
        self._changed = asyncio.Event()
        self.dead = False
        self._running: dict[str, _Running] = {}
        self._awaiting: dict[str, tuple[Submit, Channel]] = {}
        """Requests that came with a growing ticket, until their first token comes."""
        self._channels: set[Channel] = set()
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._steps = 0

    async def __aenter__(self) -> Self:
        self.epoch = await self.membership.next_epoch(self.worker_id)
        self._server = ChannelServer(
            secret=SECRET,
            worker_id=self.worker_id,
            epoch=self.epoch,
            receives=ToWorker,
            on_channel=self._on_channel,
            host="127.0.0.1",
        )
        await self._server.start()
        await self.membership.publish(self._record(), LEASE_S)
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._step_loop())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()
        if not self.dead:
            with contextlib.suppress(RedisUnavailable):
                await self.membership.remove(self.worker_id, self.epoch)

    async def die(self) -> None:
        """End as a killed process does: connections close, the lease runs out by itself."""
        self.dead = True
        self.on_death()
        await self._stop()

    async def _stop(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await self._server.close()
        await asyncio.gather(
            *(task for task in self._tasks if task is not asyncio.current_task()),
            return_exceptions=True,
        )
        self._tasks = []

    async def until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """Wait until a submission, an abort or a step makes `condition` true."""
        async with asyncio.timeout(within_s):
            while not condition():
                await self._changed.wait()

    def _tell(self) -> None:
        """Wake everybody who waits in `until`."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def running(self) -> int:
        return len(self._running) + len(self._awaiting)

    async def lose(self, code: ErrorCode) -> None:
        """End what awaits its token."""
        while self._awaiting:
            _, (submit, channel) = self._awaiting.popitem()
            error = WorkerError(code=code, message="The early transfer failed.")
            self._send(channel, [_failed(submit, error)])

    # the wire

    def _record(self) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=self.role,
            state=WorkerState.DRAINING if self.draining else WorkerState.READY,
            host="127.0.0.1",
            port=self._server.port,
            http_port=0,
            pid=0,
            model=ModelInfo(
                architecture="Fake",
                dtype="float32",
                max_model_len=self.max_model_len,
                vocab_size=self.vocab_size,
                block_size=16,
                fingerprint=FINGERPRINT.digest(),
            ),
            status=self._status(),
        )

    def _status(self) -> WorkerStatus:
        return WorkerStatus(
            blocks_total=BLOCKS,
            blocks_free=BLOCKS - self.running,
            blocks_cached=0,
            blocks_held=0,
            waiting=0,
            running=self.running,
            fetching=0,
            queued_tokens=0,
            steps=self._steps,
            draining=self.draining,
        )

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 4)
            with contextlib.suppress(RedisUnavailable):  # as a real one, it goes on regardless
                await self.membership.publish(self._record(), LEASE_S)
            for channel in self._channels:
                self._send(channel, [])

    def _send(self, channel: Channel, outputs: list[Output]) -> None:
        frame = StepFrame(
            epoch=self.epoch, step=self._steps, outputs=outputs, status=self._status()
        )
        with contextlib.suppress(ConnectionError):
            channel.send(frame)

    async def _on_channel(self, channel: Channel) -> None:
        self._channels.add(channel)
        try:
            async for message in channel:
                if isinstance(message, Submit):
                    await self._take(message, channel)
                elif isinstance(message, Abort):
                    self.aborts.append(message.request_id)
                    self._running.pop(message.request_id, None)
                    self._awaiting.pop(message.request_id, None)
                elif isinstance(message, Continue):
                    self.continues.append(message)
                    self._continue(message)
                self._tell()
        finally:
            self._channels.discard(channel)
            for request_id, running in list(self._running.items()):
                if running.channel is channel:
                    del self._running[request_id]
            self._awaiting.clear()

    async def _take(self, submit: Submit, channel: Channel) -> None:
        self.submits.append(submit)
        if self.die_at == 0:
            self._tasks.append(asyncio.create_task(self.die()))
            return
        if submit.epoch != self.epoch:
            error = WorkerError(code=ErrorCode.STALE_EPOCH, message="That was another life.")
            self._send(channel, [_failed(submit, error)])
        elif self.refuse:
            self._send(channel, [_failed(submit, self.refuse.pop(0))])
        elif submit.ticket is not None and submit.ticket.growing:
            assert not submit.output_token_ids
            self._awaiting[submit.request_id] = (submit, channel)
        else:
            if submit.hand_off and self.early:
                growing = _ticket(self, submit, growing=True)
                self._send(channel, [Output(request_id=submit.request_id, ticket=growing)])
            self._run(submit, channel, len(submit.output_token_ids))

    def _run(self, submit: Submit, channel: Channel, position: int) -> None:
        tokens = self.script(submit)[position:]
        self._running[submit.request_id] = _Running(submit, channel, tokens, position)
        self._work.set()

    def _continue(self, message: Continue) -> None:
        if message.request_id in self._awaiting:
            submit, channel = self._awaiting.pop(message.request_id)
            self._run(submit, channel, len(message.output_token_ids))

    # the "engine"

    async def _step_loop(self) -> None:
        while True:
            self._work.clear()
            if not self._running:
                await self._work.wait()
            await self.go.wait()
            await asyncio.sleep(self.step_s)
            self._steps += 1
            by_channel: dict[Channel, list[Output]] = {}
            for running in list(self._running.values()):
                by_channel.setdefault(running.channel, []).append(self._advance(running))
            for channel, outputs in by_channel.items():
                self._send(channel, outputs)
            self._tell()
            if self.pause_at and any(r.sent == self.pause_at for r in self._running.values()):
                self.go.clear()
            if self.die_at and any(r.sent >= self.die_at for r in self._running.values()):
                await asyncio.sleep(0)  # let the frame leave
                await self.die()
                return

    def _advance(self, running: _Running) -> Output:
        """One token, and what comes with it."""
        submit, sampling = running.submit, running.submit.sampling
        token = running.tokens.pop(0)
        first = running.sent == 0
        running.sent += 1
        running.position += 1
        finish: FinishReason | None = None
        stop: int | None = None
        if token in sampling.ending_token_ids and running.position > sampling.min_tokens:
            finish = FinishReason.STOP
            stop = token if token in sampling.stop_token_ids else None
        elif running.position >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        ticket = _ticket(self, submit) if submit.hand_off and finish is None else None
        if finish or ticket:
            del self._running[submit.request_id]
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [fake_logprobs(token, running.position, sampling.logprobs)]
        return Output(
            request_id=submit.request_id,
            token_ids=[token],
            logprobs=logprobs,
            finish_reason=finish,
            stop_token_id=stop,
            ticket=ticket,
            cached_tokens=3 if first else None,
            prompt_logprobs=_prompt_logprobs(submit) if first else None,
            events=_life(submit) if finish or ticket else (),
        )


def fake_logprobs(token: int, position: int, count: int) -> PositionLogprobs:
    """The drawn token is the most likely one at even positions, the last of three at odd ones."""
    others = tuple((1000 + i, -1.0 - i) for i in range(count))
    if position % 2 == 0:
        return PositionLogprobs(-0.5, 1, ((token, -0.5), *others)[:count])
    return PositionLogprobs(-9.0, count + 1, others)


def _prompt_logprobs(submit: Submit) -> list[PositionLogprobs | None] | None:
    count = submit.sampling.prompt_logprobs
    if count is None:
        return None
    found: list[PositionLogprobs | None] = [None]
    for place, token in enumerate(submit.prompt_token_ids[1:]):
        found.append(fake_logprobs(token, place, count))
    return found


def _life(submit: Submit) -> tuple[LifeEvent, ...]:
    last = events.HELD if submit.hand_off else events.FINISHED
    fetched = (events.FETCH_STARTED, events.FETCHED) if submit.ticket else ()
    names = (events.QUEUED, events.SCHEDULED, *fetched, events.FIRST_TOKEN, last)
    return tuple(LifeEvent(name, 0.001 * place) for place, name in enumerate(names))


def _failed(submit: Submit, error: WorkerError) -> Output:
    return Output(request_id=submit.request_id, finish_reason=FinishReason.ERROR, error=error)


def _ticket(worker: FakeWorker, submit: Submit, growing: bool = False) -> KVTicket:
    length = len(submit.prompt_token_ids)
    name = "second" if worker.preempted and not growing else "ticket"
    return KVTicket(
        ticket_id=f"{name}-{submit.request_id}",
        growing=growing,
        request_id=submit.request_id,
        source=worker.worker_id,
        epoch=worker.epoch,
        host="127.0.0.1",
        port=1,
        transports=("tcp",),
        fingerprint=FINGERPRINT,
        num_tokens=length,
        num_blocks=-(-length // 16),
        block_hashes=(),
        lease_s=30.0,
    )
