"""From a parsed request to the client: launch its answers, turn outputs into text, send it.

    RequestParser ─► Generation.launch ─► first outputs ─► whole body, or SSE frames ─► timings
                                   └── an error before them is an ordinary JSON error

Two tasks per request: this one, and a watcher that aborts everything when the client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import Message, Receive, Send

from pdserve.protocol.messages import Output
from pdserve.router.dispatch import Dispatcher, Flight
from pdserve.router.errors import ApiError, from_code, from_exception
from pdserve.router.metrics import RouterMetrics
from pdserve.router.openai import (
    ChunkForms,
    Json,
    LogprobWriter,
    chat_choice,
    completion_choice,
    completion_logprobs,
    usage,
)
from pdserve.router.output import AnswerText, Delta
from pdserve.router.requests import GenerateRequest
from pdserve.router.served import ServedModel

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client has left: everything is aborted, nobody listens any more."""


@dataclass(slots=True)
class Clock:
    """Moments of one request at the router, in seconds of the monotonic clock."""

    received: float
    tokenized: float = 0.0
    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


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
        received: float,
        timings: bool,
    ) -> None:
        """`timings`: the client asked for the `pdserve` member."""
        self.request = request
        self._model = model
        self._metrics = metrics
        self._timings = timings
        self._clock = Clock(received, tokenized=time.monotonic())
        tokens = model.tokenizer.tokens
        self._answers = [
            AnswerText(tokens, spec.prompt_token_ids, spec.sampling, request.text)
            for spec in request.answers
        ]
        self._writer = LogprobWriter(tokens, request.tokens_as_ids)
        prefix = "chatcmpl" if request.chat else "cmpl"
        self._id = f"{prefix}-{request.request_id}"
        self._created = int(time.time())
        self._flight: Flight = dispatcher.launch(self._id, request.answers)
        self._clock.submitted = time.monotonic()
        self._open = len(self._answers)
        speaks_of_prompt = request.echo is not None or request.return_token_ids
        self._unopened = set(range(self._open) if speaks_of_prompt and not request.chat else ())
        """Completions: answers whose first chunk, about their prompt, has not been sent."""
        self._failed = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        self._flight.__exit__()
        if kind is None and not self._failed:
            self._record()
        elif kind is not ClientGone:
            self._metrics.finished("error")

    def watch(self, receive: Receive) -> None:
        """Abort everything as soon as the client leaves."""
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._flight.client_left()

    # outputs

    async def _next(self) -> dict[int, None]:
        """Wait for outputs and feed them; the indices of the answers that grew, in order.

        Raises ApiError if an answer failed, ClientGone.
        """
        items = await self._flight.mailbox.take()
        if self._flight.gone:
            raise ClientGone
        now = time.monotonic()
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
            self._open -= 1
            if output.finish_reason is None:
                self._flight.answers[index].end()  # a stop string: the workers do not know

    def _count_token(self, first: bool, now: float) -> None:
        clock = self._clock
        if not clock.first_token:
            clock.first_token = now
            self._metrics.first_token(now - clock.received)
        elif not first and self._open == 1:
            self._metrics.next_token(now - clock.last_token)
        clock.last_token = now

    # whole answers

    async def body(self) -> Json:
        """The JSON of the whole answer. Raises ApiError, ClientGone."""
        while self._open:
            await self._next()
        deltas = [answer.take() or Delta() for answer in self._answers]
        request = self.request
        first = request.prompts[0]
        choices = []
        for index, (answer, delta) in enumerate(zip(self._answers, deltas, strict=True)):
            if request.chat:
                text = (request.echo or "") + delta.text
                choices.append(chat_choice(index, text, delta, request, self._writer))
            else:
                choices.append(
                    completion_choice(
                        index,
                        self._scored(delta),
                        request,
                        self._writer,
                        answer,
                        self._echo(index),
                    )
                )
        body: Json = {
            "id": self._id,
            "object": "chat.completion" if request.chat else "text_completion",
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self._model.fingerprint,
            "usage": self._usage(),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        if request.chat:
            body["prompt_logprobs"] = self._prompt_logprobs()
            body["prompt_token_ids"] = first.token_ids if request.return_token_ids else None
            body["prompt_text"] = first.text if request.return_prompt_text else None
        return body | self._extras()

    def _scored(self, delta: Delta) -> Delta:
        """With max_tokens 0 the token that had to be drawn is not the client's."""
        return Delta(finish_reason="length") if self.request.score_only else delta

    def _echo(self, index: int) -> str | None:
        """Completions: the prompt's text, if it is to be echoed."""
        if self.request.echo is None:
            return None
        prompt = self.request.prompts[index // self.request.n]
        if prompt.text is not None:
            return prompt.text
        return self._model.tokenizer.tokens.text(prompt.token_ids, False)

    def _prompt_logprobs(self) -> list[Any] | None:
        found = self._answers[0].prompt_logprobs
        if self.request.prompt_logprobs is None or found is None:
            return None
        ids = self.request.prompts[0].token_ids
        return self._writer.prompt(ids, found, self.request.prompt_logprobs)

    def _usage(self) -> Json:
        """Counts so far: each prompt once, the tokens of all answers."""
        completion = 0 if self.request.score_only else sum(a.count for a in self._answers)
        cached = sum(
            min(len(prompt.token_ids), self._answers[place * self.request.n].cached_tokens or 0)
            for place, prompt in enumerate(self.request.prompts)
        )
        prompts = sum(len(prompt.token_ids) for prompt in self.request.prompts)
        return usage(prompts, completion, cached)

    # streams

    async def stream(self, send: Send) -> None:
        """Send the answer as server-sent events.

        Raises ApiError only while nothing has been sent; ClientGone.
        """
        forms = ChunkForms(self.request, self._id, self._created, self._model.name, self._writer)
        started = False
        try:
            while self._open:
                grown = await self._next()
                frames = [] if started else self._roles(forms)
                for index in grown:
                    frames += self._frames(forms, index)
                if not self._open:
                    frames += [self._closing(forms), DONE]
                if not started:
                    started = True
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": SSE_HEADERS}
                    )
                if frames:
                    await send(_piece(b"".join(frames), more=bool(self._open)))
        except ClientGone:
            raise
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ApiError):
                log.exception("The stream %s failed", self._id)
            self._failed = True
            frame = b"data: " + from_exception(error).json() + b"\n\n"
            await send(_piece(frame + DONE, more=False))

    def _roles(self, forms: ChunkForms) -> list[bytes]:
        """Chat: the first chunks, one per answer; then the echoed text."""
        request, first = self.request, self.request.prompts[0]
        if not request.chat:
            return []
        ids = first.token_ids if request.return_token_ids else None
        text = first.text if request.return_prompt_text else None
        frames = [forms.role(index, ids, text) for index in range(request.n)]
        if request.echo:
            frames += [forms.text(index, request.echo) for index in range(request.n)]
        return frames

    def _prompt_chunk(self, forms: ChunkForms, index: int) -> bytes:
        """Completions: a first chunk with what is said about the prompt."""
        request, answer, echo = self.request, self._answers[index], self._echo(index)
        logprobs = None
        if echo is not None and request.logprobs is not None:
            logprobs = completion_logprobs(Delta(), request, self._writer, answer, index, echo)
        choice: Json = {
            "index": index,
            "text": echo or "",
            "logprobs": logprobs,
            "finish_reason": None,
            "stop_reason": None,
        }
        if request.return_token_ids:
            choice["prompt_token_ids"] = request.prompts[index // request.n].token_ids
            choice["token_ids"] = []
        return forms.chunk([choice])

    def _frames(self, forms: ChunkForms, index: int) -> list[bytes]:
        """What is new in one answer, if it is time to send it."""
        answer, request = self._answers[index], self.request
        frames = []
        if index in self._unopened:
            self._unopened.discard(index)
            frames.append(self._prompt_chunk(forms, index))
        early = answer.count > answer.pending() and not answer.finished
        if early and answer.pending() < request.stream_interval:
            return frames
        delta = answer.take()
        if delta is None or (request.score_only and delta.finish_reason is None):
            return frames
        if delta.finish_reason is None and forms.plain:
            return [*frames, forms.text(index, delta.text)]
        if request.score_only:
            delta = self._scored(delta)
        offset = len(self._echo(index) or "") if request.logprobs is not None else 0
        usage_now = self._usage() if request.continuous_usage else None
        members = None
        if delta.finish_reason is not None and not request.include_usage:
            members = {"system_fingerprint": self._model.fingerprint}
            if not self._open:
                members |= self._extras()
        return [*frames, forms.delta(index, delta, offset, usage_now, members)]

    def _closing(self, forms: ChunkForms) -> bytes:
        """The usage chunk, if asked for."""
        if not self.request.include_usage:
            return b""
        return forms.chunk(
            [], usage=self._usage(), system_fingerprint=self._model.fingerprint, **self._extras()
        )

    # measurements

    def _extras(self) -> Json:
        """The `pdserve` member for those who asked for timings: seconds since the request came."""
        if not self._timings:
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

    def _record(self) -> None:
        """Metrics of a request that was served."""
        clock = self._clock
        self._metrics.request(
            elapsed=time.monotonic() - clock.received,
            to_first=clock.first_token - clock.received,
            prompt_tokens=[len(prompt.token_ids) for prompt in self.request.prompts],
            answers=[(answer.finish_reason, answer.count) for answer in self._answers],
            max_tokens=[spec.sampling.max_tokens for spec in self.request.answers],
            cached_tokens=sum(answer.cached_tokens or 0 for answer in self._answers),
        )
        for answer in self._flight.answers:
            for leg in answer.legs:
                self._metrics.leg(leg.kind, leg.events)
