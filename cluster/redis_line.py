"""One connection to Redis for one script, as cheap as Python can have it: bytes out, bytes in.

The client library spends several times what a choice may cost on pools, encoders and streams. Here
calls are written as they come and answered in order (RESP2: https://redis.io/docs/latest/develop/
reference/protocol-spec/). Everything that is not on the path of a request uses the library.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio.connection import SSLConnection, parse_url

MAX_REPLY = 64 * 2**20
"""Longest reply, in bytes."""

Part = bytes | str | int


class LineError(Exception):
    """Redis answered with an error, or not in its protocol."""


def packed(*parts: Part) -> bytes:
    """The parts of a command as RESP bulk strings, without the array's header."""
    out = []
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        out.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(out)


def command(*parts: Part) -> bytes:
    return b"*%d\r\n%b" % (len(parts), packed(*parts))


@dataclass(slots=True, eq=False)
class _Call:
    missing: int
    done: asyncio.Future[list[bytes | LineError]]
    timer: asyncio.TimerHandle
    replies: list[bytes | LineError] = field(default_factory=list)


class _Line(asyncio.Protocol):
    """A connection: calls in, replies out, in order; over as soon as a reply is late, since what
    is still to come belongs to nobody."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._calls: deque[_Call] = deque()
        self._transport: asyncio.Transport | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def call(
        self, data: bytes, replies: int, until: float
    ) -> asyncio.Future[list[bytes | LineError]]:
        """Send commands that will bring so many replies by `until`, by the loop's clock."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        if self.closed or self._transport is None:
            done.set_exception(ConnectionError("the connection was closed"))
        else:
            # An asyncio.timeout around the caller would cost four times as much.
            timer = loop.call_at(until, self._end, TimeoutError("no answer in time"))
            self._calls.append(_Call(replies, done, timer))
            self._transport.write(data)
        return done

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while self._calls and self._take_reply():
                pass
            if not self._calls and self._buffer:
                raise LineError("Redis said something that nobody asked for")
        except LineError as error:
            self._end(error)

    def _take_reply(self) -> bool:
        """Hand on one reply; False if it is not complete."""
        buffer = self._buffer
        end = buffer.find(b"\r\n")
        if end < 0:
            return False
        kind, head = bytes(buffer[:1]), bytes(buffer[1:end])
        reply: bytes | LineError = head
        after = end + 2
        if kind == b"$":
            length = int(head) if head.lstrip(b"-").isdigit() else MAX_REPLY + 1
            if not 0 <= length <= MAX_REPLY:
                raise LineError(f"Redis announced a reply of {head!r:.40} bytes")
            after += length + 2
            if len(buffer) < after:
                return False
            reply = bytes(buffer[end + 2 : after - 2])
        elif kind == b"-":
            reply = LineError(head.decode(errors="replace"))
        elif kind not in (b"+", b":"):
            raise LineError(f"Redis answered with a {kind.decode(errors='replace')!r}")
        del buffer[:after]
        call = self._calls[0]
        call.replies.append(reply)
        if len(call.replies) == call.missing:
            self._calls.popleft()
            call.timer.cancel()
            if not call.done.done():
                call.done.set_result(call.replies)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("Redis closed the connection"))

    def _end(self, error: Exception) -> None:
        self.closed = True
        calls, self._calls = self._calls, deque()
        for call in calls:
            call.timer.cancel()
            if not call.done.done():
                call.done.set_exception(error)
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self._end(ConnectionError("the connection was closed"))


class ScriptLine:
    """Runs one script with the same keys again and again. Event loop only."""

    def __init__(self, url: str, script: str, keys: Sequence[str], timeout_s: float) -> None:
        """`timeout_s`: for the answers to one call, with all that it takes to get them. Raises
        ValueError for a URL that is none."""
        self._where = parse_url(url)
        self._script = script
        digest = hashlib.sha1(script.encode()).hexdigest()  # noqa: S324 - Redis' name of the script
        self._head = packed("EVALSHA", digest, len(keys), *keys)
        self._head_parts = 3 + len(keys)
        self._timeout_s = timeout_s
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    async def run(self, calls: Sequence[bytes], parts: int) -> list[bytes]:
        """The script's answers to some sets of `parts` arguments each (see `packed`), in one round
        trip. Raises OSError (TimeoutError among them), LineError."""
        head = b"*%d\r\n%b" % (self._head_parts + parts, self._head)
        data = b"".join([head + call for call in calls])
        until = asyncio.get_running_loop().time() + self._timeout_s
        try:
            replies = await self._call(data, len(calls), until)
            if any(isinstance(one, LineError) and "NOSCRIPT" in str(one) for one in replies):
                _good(await self._call(command("SCRIPT", "LOAD", self._script), 1, until))
                replies = await self._call(data, len(calls), until)
        except (asyncio.CancelledError, OSError):
            self.close()
            raise
        return _good(replies)

    async def _call(self, data: bytes, count: int, until: float) -> list[bytes | LineError]:
        line = self._line
        if line is None or line.closed:
            async with asyncio.timeout_at(until):
                line = await self._connected(until)
        return await line.call(data, count, until)

    async def _connected(self, until: float) -> _Line:
        async with self._connecting:
            if self._line is not None and not self._line.closed:
                return self._line
            line = await self._new_line()
            try:
                await self._greet(line, until)
            except BaseException:
                line.close()
                raise
            self._line = line
            return line

    async def _new_line(self) -> _Line:
        loop, where = asyncio.get_running_loop(), self._where
        if "path" in where:
            return (await loop.create_unix_connection(_Line, where["path"]))[1]
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        return (await loop.create_connection(_Line, host, port, ssl=_tls(where)))[1]

    async def _greet(self, line: _Line, until: float) -> None:
        where = self._where
        if where.get("password"):
            user = [where["username"]] if where.get("username") else []
            _good(await line.call(command("AUTH", *user, where["password"]), 1, until))
        if where.get("db"):
            _good(await line.call(command("SELECT", where["db"]), 1, until))

    def close(self) -> None:
        """Forget the connection; the next call makes another one."""
        if self._line is not None:
            self._line.close()
            self._line = None


def _good(replies: Sequence[bytes | LineError]) -> list[bytes]:
    """The replies, or the first error among them as an exception."""
    found = []
    for reply in replies:
        if isinstance(reply, LineError):
            raise reply
        found.append(reply)
    return found


def _tls(where: Mapping[str, Any]) -> ssl.SSLContext | None:
    """For rediss:// URLs, with the options that the library knows; else None."""
    make = where.get("connection_class")
    if make is None or not issubclass(make, SSLConnection):
        return None
    rest = {name: value for name, value in where.items() if name != "connection_class"}
    context: ssl.SSLContext = make(**rest).ssl_context.get()
    return context
