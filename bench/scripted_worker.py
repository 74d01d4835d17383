"""Workers without an engine, for measurements of routers: a real channel and real membership, and
tokens that cost nothing. Every step brings each running request one token, in one frame per router.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Self

from pdserve.cluster.channel import Channel, ChannelServer
from pdserve.cluster.membership import Membership
from pdserve.cluster.records import ModelInfo, Role, WorkerRecord, WorkerState
from pdserve.protocol import events
from pdserve.protocol.messages import (
    Abort,
    FinishReason,
    LifeEvent,
    Output,
    StepFrame,
    Submit,
    ToWorker,
    WorkerStatus,
)
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint

LEASE_S = 2.5
BLOCKS, BLOCK = 100_000, 16
LAYOUT = LayoutFingerprint(
    model="scripted", weights="0", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=1,
    block_size=BLOCK,
)  # fmt: skip


@dataclass(slots=True, eq=False)
class _Running:
    submit: Submit
    channel: Channel
    position: int


@dataclass(eq=False)
class ScriptedWorker:
    """One worker; its answers are the tokens `tokens`, over and over."""

    membership: Membership
    role: Role
    secret: str
    tokens: list[int]
    max_model_len: int
    vocab_size: int
    step_s: float
    """From one token of a request to the next."""
    _running: dict[str, _Running] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _steps: int = 0

    async def __aenter__(self) -> Self:
        self._name = f"{self.role}-scripted"
        self._epoch = await self.membership.next_epoch(self._name)
        self._channels: set[Channel] = set()
        self._server = ChannelServer(
            secret=self.secret, worker_id=self._name, epoch=self._epoch, receives=ToWorker,
            on_channel=self._serve, host="127.0.0.1",
        )  # fmt: skip
        await self._server.start()
        await self.membership.publish(self._record(), LEASE_S)
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._step())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()

    def _status(self) -> WorkerStatus:
        running = len(self._running)
        return WorkerStatus(
            blocks_total=BLOCKS, blocks_free=BLOCKS - running, blocks_cached=0, blocks_held=0,
            waiting=0, running=running, fetching=0, queued_tokens=0, steps=self._steps,
        )  # fmt: skip

    def _record(self) -> WorkerRecord:
        model = ModelInfo(
            architecture="Scripted", dtype="float32", max_model_len=self.max_model_len,
            vocab_size=self.vocab_size, block_size=BLOCK, fingerprint=LAYOUT.digest(),
        )  # fmt: skip
        return WorkerRecord(
            worker_id=self._name, epoch=self._epoch, role=self.role, state=WorkerState.READY,
            host="127.0.0.1", port=self._server.port, http_port=0, pid=0, model=model,
            status=self._status(),
        )  # fmt: skip

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 4)
            await self.membership.publish(self._record(), LEASE_S)
            for channel in self._channels:
                self._send(channel, [])

    def _send(self, channel: Channel, outputs: list[Output]) -> None:
        frame = StepFrame(
            epoch=self._epoch, step=self._steps, outputs=outputs, status=self._status()
        )
        with contextlib.suppress(ConnectionError):
            channel.send(frame)

    async def _serve(self, channel: Channel) -> None:
        self._channels.add(channel)
        try:
            async for message in channel:
                if isinstance(message, Submit):
                    known = len(message.output_token_ids)
                    self._running[message.request_id] = _Running(message, channel, known)
                elif isinstance(message, Abort):
                    self._running.pop(message.request_id, None)
        finally:
            self._channels.discard(channel)

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            self._steps += 1
            outputs: dict[Channel, list[Output]] = {}
            for running in list(self._running.values()):
                outputs.setdefault(running.channel, []).append(self._advance(running))
            for channel, of_channel in outputs.items():
                self._send(channel, of_channel)

    def _advance(self, running: _Running) -> Output:
        submit, token = running.submit, self.tokens[running.position % len(self.tokens)]
        first = running.position == len(submit.output_token_ids)
        running.position += 1
        ended = running.position >= submit.sampling.max_tokens
        ticket = self._ticket(submit) if submit.hand_off and not ended else None
        if ended or ticket:
            del self._running[submit.request_id]
        return Output(
            request_id=submit.request_id,
            token_ids=[token],
            finish_reason=FinishReason.LENGTH if ended else None,
            ticket=ticket,
            cached_tokens=0 if first else None,
            events=_life(submit) if ended or ticket else (),
        )

    def _ticket(self, submit: Submit) -> KVTicket:
        return KVTicket(
            ticket_id=f"ticket-{submit.request_id}", request_id=submit.request_id,
            source=self._name, epoch=self._epoch, host="127.0.0.1", port=1, transports=("tcp",),
            fingerprint=LAYOUT, num_tokens=submit.prompt_len,
            num_blocks=-(-submit.prompt_len // BLOCK), block_hashes=(), lease_s=30.0,
        )  # fmt: skip


def _life(submit: Submit) -> tuple[LifeEvent, ...]:
    last = events.HELD if submit.hand_off else events.FINISHED
    names = (events.QUEUED, events.SCHEDULED, events.FIRST_TOKEN, last)
    return tuple(LifeEvent(name, 0.001 * place) for place, name in enumerate(names))
