"""From a parsed request to the client: launch its answers, turn outputs into text, send it.

    RequestParser ─► Generation.launch ─► first outputs ─► whole body, or SSE frames ─► timings
                                   │                       (a `Writer` knows their shapes)
                                   └── an error before them is an ordinary JSON error

Two tasks per request: this one, and a watcher that aborts everything when the client leaves.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import types
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import Message, Receive, Send

from pdserve.cluster.journal import Record
from pdserve.cluster.requests import Holder, RequestRecord
from pdserve.protocol.events import QUEUED, SCHEDULED
from pdserve.protocol.messages import FinishReason, Output
from pdserve.router.dispatch import Dispatcher, Flight
from pdserve.router.errors import ApiError, from_code, from_exception
from pdserve.router.metrics import RouterMetrics
from pdserve.router.output import AnswerText
from pdserve.router.recorder import Recorder
from pdserve.router.requests import GenerateRequest
from pdserve.router.served import ServedModel
from pdserve.router.story import MAX_ANSWERS, answer_story, header
from pdserve.router.writer import Json, Progress, WriterOf

log = logging.getLogger(__name__)

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


STALL_S = 60.0
"""A client that takes nothing from its connection for so long is treated as gone."""


def impatient(send: Send) -> Send:
    """`send` that raises ClientGone if the client does not read."""

    async def bounded(message: Message) -> None:
        step = send(message).__await__()
        try:
            first = next(step)
        except StopIteration:
            return  # as nearly always: what need not wait needs no timer, which costs more than it
        try:
            async with asyncio.timeout(STALL_S):
                await _rest(step, first)
        except TimeoutError:
            raise ClientGone from None

    return bounded


@types.coroutine
def _rest(step: Generator[Any, Any, None], first: object) -> Generator[Any, Any, None]:
    """What is left of something awaited that has come as far as waiting for `first`."""
    waits_for = first
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:
            resume = functools.partial(step.throw, error)
        else:
            resume = functools.partial(step.send, sent)
        try:
            waits_for = resume()
        except StopIteration:
            return


class ClientGone(Exception):
    """The client has left: everything is aborted, nobody listens any more."""


async def until_gone(receive: Receive) -> None:
    """Ends when the client, whose request has been read, leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True)
class Clock:
    """Moments of one request at the router, in seconds of the monotonic clock."""

    received: float
    tokenized: float = 0.0
    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """What a client wants to know besides the answer."""

    request_id: str
    """x-request-id of the response."""
    timings: bool = False
    """The `pdserve` member of the answer."""
    explain: bool = False
    """The header EXPLAIN_HEADER of the response."""


EXPLAIN_HEADER = "x-pdserve-explain"


def _piece(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Generation:
    """One HTTP request while it is served. Use as a context: leaving it aborts what still runs."""

    def __init__(
        self,
        request: GenerateRequest,
        model: ServedModel,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        recorder: Recorder,
        received: float,
        inquiry: Inquiry,
        write: WriterOf,
    ) -> None:
        """`write` makes the writer."""
        self.request = request
        self._metrics = metrics
        self._recorder = recorder
        self._inquiry = inquiry
        self._router = dispatcher.pool.name
        self._clock = Clock(received, tokenized=time.monotonic())
        tokens = model.tokenizer.tokens
        self._answers = [
            AnswerText(tokens, spec.prompt_token_ids, spec.sampling, request.text(index))
            for index, spec in enumerate(request.answers)
        ]
        self._progress = Progress(
            request=request,
            model=model,
            answers=self._answers,
            open=len(self._answers),
            created=int(time.time()),
            extras=self._extras,
            times=self._times,
            stored=self._stored,
        )
        self._writer = write(self._progress)
        self._flight: Flight = dispatcher.launch(
            request.response_id, request.answers, time.monotonic() - received
        )
        self._clock.submitted = time.monotonic()
        self._heard_at = self._clock.submitted
        """When something was last heard of the answers, or said to break the silence."""
        self._ping: asyncio.TimerHandle | None = None
        self._failed = False
        self._state = "running"
        self._error = ""
        self._watcher: asyncio.Task[None] | None = None
        recorder.begin(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        for scheduled in (self._watcher, self._ping):
            if scheduled is not None:
                scheduled.cancel()
        self._flight.__exit__()
        if kind is None and not self._failed:
            self._state = "finished"
            self._count()
        elif kind is not ClientGone:
            self._state = "failed"
            if error is not None:
                self._error = from_exception(error).message
            self._metrics.finished("error")
        else:
            self._state = "client left"
        self._recorder.end(self)

    def watch(self, receive: Receive) -> None:
        """Abort everything as soon as the client leaves."""
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        await until_gone(receive)
        self._flight.client_left()

    def abort(self) -> None:
        """End all answers as they are; the client gets what there is, finished by "abort"."""
        for answer in self._flight.answers:
            if not answer.done:
                answer.end()
        for index, text in enumerate(self._answers):
            if not text.finished:
                ended = Output(request_id="", finish_reason=FinishReason.ABORT)
                self._flight.mailbox.put(index, ended)

    # outputs

    async def _next(self) -> dict[int, None]:
        """Wait for outputs and feed them; the indices of the answers that grew, in order.

        Raises ApiError if an answer failed, ClientGone.
        """
        items = await self._flight.mailbox.take()
        if self._flight.gone:
            raise ClientGone
        now = time.monotonic()
        if items:
            self._heard_at = now
        grown: dict[int, None] = {}
        for index, output in items:
            answer = self._answers[index]
            if answer.finished:
                continue
            if output.error is not None:
                raise from_code(output.error.code, output.error.message)
            self._feed(index, answer, output, now)
            grown[index] = None
        return grown

    def _feed(self, index: int, answer: AnswerText, output: Output, now: float) -> None:
        if output.token_ids:
            self._count_token(answer.count == 0, now)
        answer.feed(output)
        if answer.finished:
            self._progress.open -= 1
            if output.finish_reason is None:
                self._flight.answers[index].end()  # a stop string: the workers do not know

    def _count_token(self, first: bool, now: float) -> None:
        clock = self._clock
        if not clock.first_token:
            clock.first_token = now
            self._metrics.first_token(now - clock.received)
        elif not first and self._progress.open == 1:
            self._metrics.next_token(now - clock.last_token)
        clock.last_token = now

    async def body(self) -> Json:
        """The JSON of the whole answer. Raises ApiError, ClientGone."""
        while self._progress.open:
            await self._next()
        return self._writer.body()

    async def stream(self, send: Send) -> None:
        """Send the answer as server-sent events.

        Raises ApiError only while nothing has been sent; ClientGone.
        """
        writer, progress = self._writer, self._progress
        send = impatient(send)
        started = False
        self._expect_silence()
        try:
            while progress.open:
                grown = await self._next()
                frames = [] if started else writer.opening()
                for index in grown:
                    frames += writer.frames(index)
                if not progress.open:
                    frames += writer.closing()
                if not started:
                    started = True
                    headers = [*SSE_HEADERS, *self._explain_raw()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if not grown:
                    frames.append(writer.keep_alive)
                if frames:
                    await send(_piece(b"".join(frames), more=bool(progress.open)))
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ApiError):
                log.exception("The stream %s failed", self.request.response_id)
            self._failed = True
            self._error = from_exception(error).message
            await send(_piece(writer.error(from_exception(error)), more=False))

    def _expect_silence(self) -> None:
        """From now on, wake up to break each silence, also that before the first token."""
        silence_s = self._writer.silence_s
        if silence_s:
            loop = asyncio.get_running_loop()
            self._ping = loop.call_at(self._heard_at + silence_s, self._break_silence)

    def _break_silence(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._heard_at >= self._writer.silence_s:
            self._heard_at = loop.time()
            self._flight.mailbox.wake()
        self._expect_silence()

    # measurements

    def _times(self) -> Json | None:
        """`metrics` of an answer that has ended; milliseconds, tokens per second."""
        if not self.request.metrics:
            return None
        clock, count = self._clock, self._answers[0].count
        generating_s = clock.last_token - clock.first_token
        at = {event.name: event.at_s for leg in self._flight.answers[0].legs[:1]
              for event in leg.events}  # fmt: skip
        queued_s = at.get(SCHEDULED, 0.0) - at.get(QUEUED, 0.0)
        between_s = generating_s / (count - 1) if count > 1 else None
        return {
            "time_to_first_token_ms": 1000 * (clock.first_token - clock.received),
            "generation_time_ms": 1000 * generating_s,
            "queue_time_ms": 1000 * queued_s,
            "mean_itl_ms": None if between_s is None else 1000 * between_s,
            "tokens_per_second": 1 / between_s if between_s else None,
            "speculative_decoding": None,
        }

    def _stored(self) -> int:
        """Whole blocks, and never the last token, which is always computed."""
        n, total = self.request.n, 0
        for place, prompt in enumerate(self.request.prompts):
            legs = self._flight.answers[place * n].legs
            model = next((leg.link.record.model for leg in legs if leg.answered), None)
            if model is not None:
                whole = (len(prompt.token_ids) - 1) // model.block_size * model.block_size
                total += max(0, whole - (self._answers[place * n].cached_tokens or 0))
        return total

    def _extras(self) -> Json:
        """The `pdserve` member for those who asked for timings: seconds since the request came."""
        if not self._inquiry.timings:
            return {}
        clock, start = self._clock, self._clock.received
        return {
            "pdserve": {
                "router": {
                    "tokenized": clock.tokenized - start,
                    "submitted": clock.submitted - start,
                    "first_token": clock.first_token - start,
                    "last_token": clock.last_token - start,
                    "finished": time.monotonic() - start,
                },
                "choices": [
                    {
                        "index": index,
                        "legs": [
                            {
                                "worker": leg.link.worker_id,
                                "epoch": leg.link.epoch,
                                "role": leg.link.role.value,
                                "kind": leg.kind,
                                "submitted": leg.submitted_at - start,
                                "events": [[event.name, event.at_s] for event in leg.events],
                            }
                            for leg in answer.legs
                        ],
                    }
                    for index, answer in enumerate(self._flight.answers)
                ],
            }
        }

    def explain_headers(self) -> dict[str, str]:
        """The choices so far, for those who asked."""
        if not self._inquiry.explain:
            return {}
        received = self._clock.received
        legs = [answer.legs for answer in self._flight.answers]
        return {EXPLAIN_HEADER: header([answer_story(one, 0, "", received) for one in legs])}

    def _explain_raw(self) -> list[tuple[bytes, bytes]]:
        return [(name.encode(), text.encode()) for name, text in self.explain_headers().items()]

    def progress_mark(self) -> object:
        """Changes with every leg that begins, answers or fails."""
        legs = [leg for answer in self._flight.answers for leg in answer.legs]
        return len(legs), sum(leg.answered for leg in legs), sum(bool(leg.error) for leg in legs)

    def record(self) -> Record:
        """The request's story so far."""
        clock, now, start = self._clock, time.monotonic(), self._clock.received
        told = list(zip(self._flight.answers, self._answers, strict=True))[:MAX_ANSWERS]
        return Record(
            id=self.request.response_id,
            request_id=self._inquiry.request_id,
            router=self._router,
            state=self._state,
            received=time.time() - (now - start),
            elapsed_s=now - start,
            tokenized_s=clock.tokenized - start,
            submitted_s=max(0.0, clock.submitted - start),
            first_token_s=max(0.0, clock.first_token - start),
            error=self._error,
            prompt_tokens=self.request.prompt_tokens,
            answers=[
                answer_story(answer.legs, text.count, text.finish_reason, start)
                for answer, text in told
            ],
            more_answers=len(self._answers) - len(told),
        )

    def request_record(self) -> RequestRecord:
        """Where the request is now, for whoever looks in Redis."""
        now, moment = time.time(), time.monotonic()
        answers = self._flight.answers
        return RequestRecord(
            id=self.request.response_id,
            request_id=self._inquiry.request_id,
            router=self._router,
            received=now - (moment - self._clock.received),
            deadline=now + (self._flight.deadline - moment),
            prompt_tokens=self.request.prompt_tokens,
            tokens=sum(text.count for text in self._answers),
            holders=[
                Holder(leg.link.worker_id, leg.link.epoch, leg.kind)
                for answer in answers
                for leg in answer.held_by
            ],
        )

    def _count(self) -> None:
        """Metrics of a request that was served."""
        clock = self._clock
        self._metrics.request(
            elapsed=time.monotonic() - clock.received,
            to_first=clock.first_token - clock.received,
            prompt_tokens=[len(prompt.token_ids) for prompt in self.request.prompts],
            answers=[(answer.finish_reason, answer.count) for answer in self._answers],
            max_tokens=[spec.sampling.max_tokens for spec in self.request.answers],
            cached_tokens=[answer.cached_tokens or 0 for answer in self._answers],
        )
        for answer in self._flight.answers:
            self._metrics.legs.answer(answer.legs)
