"""Responses made in the background: a task each, whose client is the store.

GenerationResponse ─frames─► BackgroundJob ─every FLUSH_S──► ResponseStore
                    ◄─gone──               ◄─not open any more── (cancelled, deleted)
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from starlette.types import ASGIApp, Message, Scope

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.responses import MAX_EVENTS_BYTES, ResponseStore
from pdserve.router.errors import ApiError
from pdserve.router.responses_writer import Reply, failure
from pdserve.router.writer import Json

log = logging.getLogger(__name__)

FLUSH_S = 0.1
"""What was said waits for so long."""
RENEW_S = 0.5
"""A response about which there is no news is renewed so often."""
FINISH_S = 10.0
"""For so long it is tried to write an end while Redis is away."""


class BackgroundJob:
    """One response; owns its generation and the lease of its record."""

    def __init__(
        self, store: ResponseStore, reply: Reply, answer: ASGIApp, scope: Scope, stream: bool
    ) -> None:
        """`answer` is what a client in the foreground would be sent; the record exists already."""
        self._store = store
        self._reply = reply
        self._stream = stream
        self._answer = answer
        self._scope = scope
        self._gone = asyncio.Event()
        """The answer's client has left."""
        self._why = ""
        """Why it was made to leave."""
        self._status = 0
        self._frames: list[bytes] = []
        """Events that have not been written, as far as is known."""
        self._first = 0
        """Number of the first of them."""
        self._logged = 0
        """Bytes of events so far."""
        self._text = b""

    def stop(self, why: str) -> None:
        """End it as failed."""
        self._why = why
        self._gone.set()

    async def run(self) -> None:
        answer = asyncio.ensure_future(self._answer(self._scope, self._receive, self._send))
        renewed = time.monotonic()
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=FLUSH_S)
                due = time.monotonic() - renewed >= RENEW_S
                if not answer.done() and (due or self._frames):
                    renewed = time.monotonic()
                    await self._renew()
        finally:
            answer.cancel()
            await asyncio.wait([answer])
        error = None if answer.cancelled() else answer.exception()
        if error is not None:
            log.error("The background response %s failed", self._reply.id, exc_info=error)
        await self._finish()

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif self._reply.error is not None:
            return  # readers of the log are told of it by the record
        elif self._stream and self._status == 200:
            self._log(message.get("body", b""))
        else:
            self._text += message.get("body", b"")

    def _log(self, frames: bytes) -> None:
        self._logged += len(frames)
        if self._logged > MAX_EVENTS_BYTES:
            self.stop(
                f"The events of the stream took more than {MAX_EVENTS_BYTES} bytes; ask for it "
                "without stream."
            )
            return
        self._frames += [one + b"\n\n" for one in frames.split(b"\n\n") if one]

    async def _renew(self) -> None:
        frames = self._frames[:]
        try:
            if not await self._store.renew(self._reply.id, "in_progress", self._first, frames):
                self._gone.set()
        except RedisUnavailable as error:
            log.debug("The background response %s waits for Redis: %s", self._reply.id, error)
            return
        self._first += len(frames)
        del self._frames[: len(frames)]

    def _end(self) -> Json:
        """The response object at its end."""
        reply, error = self._reply, self._reply.error
        if self._why:
            error = ApiError(self._why)
        elif error is None and self._status >= 400:
            told = msgspec.json.decode(self._text)["error"]
            error = ApiError(told["message"], status=self._status)
        if error is None and reply.final is not None:
            return reply.final
        return reply.response("failed", error=failure(error or ApiError("The response failed.")))

    async def _finish(self) -> None:
        body, frames = self._end(), self._frames
        deadline = time.monotonic() + FINISH_S
        while True:
            try:
                await self._store.finish(body, self._first, frames)
                return
            except ValueError as error:
                problem = failure(ApiError(str(error)))
                body, frames = self._reply.response("failed", error=problem), []
            except RedisUnavailable as error:
                if time.monotonic() > deadline or self._why:
                    log.warning("The end of the response %s is lost: %s", self._reply.id, error)
                    return
                await asyncio.sleep(RENEW_S)


class Background:
    """The jobs of one router. Event loop only."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._jobs: dict[BackgroundJob, asyncio.Task[None]] = {}

    def start(self, reply: Reply, answer: ASGIApp, scope: Scope, stream: bool) -> None:
        """Begin one whose record has been created."""
        job = BackgroundJob(self._store, reply, answer, scope, stream)
        task = asyncio.create_task(job.run())
        self._jobs[job] = task
        task.add_done_callback(lambda _: self._jobs.pop(job))

    async def close(self) -> None:
        """End them all as failed."""
        for job in self._jobs:
            job.stop("The router was stopped.")
        if self._jobs:
            await asyncio.wait(self._jobs.values())
