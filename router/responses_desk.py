"""What this router keeps of responses: the store that all routers share, and its own jobs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.cluster.membership import RedisUnavailable
from pdserve.cluster.responses import ResponseStore, StoredResponse
from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.background import Background
from pdserve.router.errors import ApiError, BadRequest, Unavailable
from pdserve.router.generation import SSE_HEADERS, ClientGone, impatient, until_gone
from pdserve.router.responses_writer import Reply, failure, frame
from pdserve.router.writer import Json

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.1
"""Readers of a background stream ask for news so often."""
PAUSE_S = 1.0
"""Where Redis did not answer, nothing is stored for so long: nobody's answer waits for it."""
PAGE = 500
"""Events read at once."""
TOO_LONG = "set store to false, or shorten the conversation"


class ResponsesDesk:
    """Event loop only."""

    def __init__(self, settings: RouterSettings) -> None:
        self._store: ResponseStore | None = None
        self._background: Background | None = None
        self._paused_until = 0.0
        if settings.responses_ttl:
            ttl_s = settings.responses_ttl
            self._store = ResponseStore(settings.redis, settings.cluster, ttl_s=ttl_s)
            self._background = Background(self._store)

    async def close(self) -> None:
        if self._background is not None:
            await self._background.close()
        if self._store is not None:
            await self._store.close()

    @property
    def stores(self) -> bool:
        return self._store is not None

    async def check(self) -> None:
        """Raises Unavailable if nothing could be stored now."""
        if self._store is not None:
            await _asked(self._store.check())

    async def find(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """Raises ApiError."""
        found = None
        if self._store is not None:
            found = await _asked(self._store.find(response_id))
        if found is None:
            raise not_found(response_id, param)
        return found

    async def free(self, response_id: str) -> None:
        """Raises BadRequest if there is a response with this id."""
        if self._store is not None and await _asked(self._store.find(response_id)) is not None:
            raise BadRequest(
                f"request_id {response_id!r} is the id of a stored response; choose another.",
                param="request_id",
            )

    async def cancel(self, response_id: str) -> StoredResponse:
        """The response, if it is cancelled now. Raises ApiError."""
        found = await self.find(response_id)
        if found.background and self._store is not None:
            await _asked(self._store.cancel(response_id))
            found = await self.find(response_id)
        if found.body["status"] == "cancelled":
            return found
        raise ApiError(
            f"Cannot cancel a synchronous response. This one is {found.body['status']}.",
            status=400,
            kind="invalid_request_error",
            param="response_id",
        )

    async def delete(self, response_id: str) -> None:
        """Raises ApiError."""
        if self._store is None or not await _asked(self._store.delete(response_id)):
            raise not_found(response_id)

    async def begin(
        self, reply: Reply, kept: StoredResponse, answer: ASGIApp, scope: Scope
    ) -> None:
        """Make a response in the background. Raises ApiError."""
        assert self._store is not None and self._background is not None
        try:
            created = await _asked(self._store.create(kept))
        except ValueError as error:
            raise BadRequest(f"{error} Please {TOO_LONG}.", param="input") from None
        if not created:
            raise BadRequest(f"The request_id {reply.id!r} is taken.", param="request_id")
        self._background.start(reply, answer, scope, kept.stream)

    async def keep(self, kept: StoredResponse) -> None:
        """Store what has been made; without Redis it is served all the same."""
        assert self._store is not None
        if time.monotonic() < self._paused_until:
            log.debug("The response %s is not stored: Redis is away", kept.body["id"])
            return
        try:
            await self._store.create(kept)
        except ValueError as error:
            log.warning("The response %s is not stored: %s", kept.body["id"], error)
        except RedisUnavailable as error:
            self._paused_until = time.monotonic() + PAUSE_S
            log.warning("Responses are not stored: %s", error)

    def kept(self, answer: ASGIApp, reply: Reply, history: list[Json], given: list[Json]) -> Kept:
        return Kept(self, answer, reply, history, given)

    def follow(self, response_id: str, after: int) -> Follow:
        assert self._store is not None
        return Follow(self._store, response_id, after)


async def _asked(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except RedisUnavailable as error:
        raise Unavailable(
            f"Stored responses cannot be had now: {error} Requests with store false are served."
        ) from None


def not_found(response_id: str, param: str = "response_id") -> ApiError:
    return ApiError(
        f"Response with id '{response_id:.200}' not found.",
        status=404,
        kind="invalid_request_error",
        param=param,
    )


class Kept(Response):
    """An answer that is stored just before its end is sent: who has read it can refer to it."""

    background = None

    def __init__(
        self,
        desk: ResponsesDesk,
        answer: ASGIApp,
        reply: Reply,
        history: list[Json],
        given: list[Json],
    ) -> None:
        self._desk = desk
        self._answer = answer
        self._reply = reply
        self._history = history
        self._given = given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            final = self._reply.final
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if last and final is not None and self._reply.error is None:
                await self._desk.keep(
                    StoredResponse(
                        body=final,
                        history=self._history,
                        input=self._given,
                        background=False,
                        stream=False,
                    )
                )
            await send(message)

        await self._answer(scope, receive, send_on)


class Follow(Response):
    """The events of a background stream, those that are there and then those that come."""

    background = None

    def __init__(self, store: ResponseStore, response_id: str, after: int) -> None:
        """`after`: number of the last event that the client has; -1: none."""
        self._store = store
        self._id = response_id
        self._next = after + 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = impatient(send)
        gone = asyncio.create_task(until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            more = True
            while more and not gone.done():
                frames, more = await self._news()
                if frames or not more:
                    body = b"".join(frames)
                    await send({"type": "http.response.body", "body": body, "more_body": more})
                elif more:
                    await asyncio.wait([gone], timeout=POLL_S)
        except ClientGone:
            pass
        finally:
            gone.cancel()

    async def _news(self) -> tuple[list[bytes], bool]:
        """Further events, and whether there may be more of them."""
        try:
            found = await self._store.events(self._id, self._next, PAGE)
            self._next += len(found.frames)
            if found.status in ("queued", "in_progress") or self._next < found.length:
                return found.frames, True
            return [*found.frames, *await self._ending(found.status, found.length)], False
        except RedisUnavailable as error:
            problem = failure(Unavailable(str(error)))
            return [frame("error", self._next, **problem, param=None)], False

    async def _ending(self, status: str, length: int) -> list[bytes]:
        """The last event of a stream that did not come to its own end."""
        if status in ("completed", "incomplete") or (status and self._next > length):
            return []
        stored = await self._store.find(self._id)
        if stored is None:
            problem = failure(not_found(self._id))
            return [frame("error", self._next, **problem, param=None)]
        kind = "response.failed" if status == "failed" else "response.completed"
        return [frame(kind, self._next, response=stored.body)]
