"""HTTP/1.1 as a load generator needs it: one request, and when each piece of its answer came.

A general client spends half a millisecond and more on a request, and a tenth of one on each piece;
here the time of a piece is taken in the callback that receives it, and httptools reads it. Nothing
is followed, decoded or tried again.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

from pdserve.bench.arrivals import BenchError


class WireError(Exception):
    """The exchange broke off; the message says how."""


class Exchange:
    """The answer to one request, as it comes in. Made on the event loop."""

    __slots__ = ("chunks", "done", "status")

    def __init__(self) -> None:
        self.status = 0
        self.chunks: list[tuple[float, bytes]] = []
        """(time.perf_counter() at which it was received, bytes of the body)."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Connection(asyncio.Protocol):
    """Carries one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable = False
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are no asyncio.Transport, but all that is asked of one.
        self.transport, self.usable = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        self._at = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"The server sent what is no HTTP: {error}.")
            assert self.transport is not None
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        reason = f": {error}" if error else ""
        self._break(f"The connection ended before the answer did{reason}.")

    def _break(self, message: str) -> None:
        self.usable = False
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_exception(WireError(message))

    def send(self, request: bytes, exchange: Exchange) -> None:
        assert self.transport is not None
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def close(self) -> None:
        self._exchange, self.usable = None, False
        if self.transport is not None:
            self.transport.abort()

    # what the parser calls

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.chunks.append((self._at, body))

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_result(None)


class Wire:
    """Connections to one server: as many as there are exchanges at once, used again and again.
    Event loop only; `close` ends them."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """Raises BenchError for what is no http(s) URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"{url!r} is no http:// or https:// address.")
        try:
            port = parts.port
        except ValueError:
            raise BenchError(f"{url!r} names no port that there can be.") from None
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        lines = {"host": parts.netloc.rpartition("@")[2], **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        if self._head.count("\r\n") != len(lines) or not self._head.isascii():
            raise BenchError("Headers must be single lines of ASCII.")
        self._idle: list[_Connection] = []

    def post(self, path: str, body: bytes) -> bytes:
        """A request, ready to be sent."""
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._head}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def connect(self) -> None:
        """Have a connection ready for the next exchange. Raises OSError."""
        if not any(one.usable for one in self._idle):
            self._idle.append(await self._open())

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, found = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls,
        )  # fmt: skip
        return found

    async def exchange(self, request: bytes, exchange: Exchange) -> None:
        """Send a request and take its answer. Raises WireError, OSError: what has come by then is
        in `exchange`. Being cancelled costs the connection."""
        connection = self._free() or await self._open()
        try:
            connection.send(request, exchange)
            await exchange.done
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()

    def _free(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
