"""Authenticated connections that carry messages both ways.

    client                                      worker
    connect() ──TCP──► handshake ──► Channel ◄──► Channel ◄── handshake ◄── ChannelServer

Sends are gathered until the end of the event loop's tick and leave in one write; whatever one read
brings is cut into frames at once. Nothing piles up without a bound: a peer that does not read is
cut off, and a consumer that does not iterate stops the reading from the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, cast

import msgspec

from pdserve.protocol.errors import AuthenticationError, ProtocolError
from pdserve.protocol.handshake import (
    HANDSHAKE_LIMIT,
    HANDSHAKE_TIMEOUT_S,
    Challenge,
    Handshake,
    Proof,
    Welcome,
    challenge,
    check_welcome,
    prove,
    welcome,
)
from pdserve.protocol.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    FrameSplitter,
    MessageDecoder,
    body_length,
    encode_frame,
)

log = logging.getLogger(__name__)

MAX_BUFFER_BYTES = MAX_FRAME_BYTES + 32 * 2**20
"""A peer that leaves more than this unread is cut off (the longest frame has room); the
reading side stops reading here."""
MAX_STRANGERS = 64
"""Connections that may be in their handshake at the same time; more are closed at once."""
CLOSE_TIMEOUT_S = 1.0
"""How long a closing channel tries to get rid of what was sent."""

_HANDSHAKE = MessageDecoder[Handshake](Handshake)


class _FrameStream(asyncio.Protocol):
    """Frame bodies in and out of one socket.

    Before `unlock()` it hands out one frame at a time, at most HANDSHAKE_LIMIT bytes long, and
    reads no further: what the peer sends behind its last handshake frame waits in `_early`.
    """

    def __init__(
        self, max_buffer: int, on_connected: Callable[[_FrameStream], None] | None = None
    ) -> None:
        self._max_buffer = max_buffer
        self._on_connected = on_connected
        self._loop = asyncio.get_running_loop()
        self._splitter: FrameSplitter | None = None
        self._early = bytearray()
        self._bodies: deque[bytes] = deque()
        self._queued_bytes = 0
        self._reading = True
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._arrival: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.fault: ProtocolError | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._on_connected is not None:
            self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        if self._splitter is None:
            self._early += data
            self._pause_if(len(self._early) > HANDSHAKE_LIMIT)
        else:
            self._split(data)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        self._wake()

    # incoming

    async def handshake_frame(self) -> bytes:
        """The next frame of at most HANDSHAKE_LIMIT bytes.

        Raises ProtocolError if it is longer, ConnectionError at the end of the connection.
        """
        while True:
            if len(self._early) >= HEADER.size:
                end = HEADER.size + body_length(self._early[: HEADER.size], HANDSHAKE_LIMIT)
                if len(self._early) >= end:
                    body = bytes(self._early[HEADER.size : end])
                    del self._early[:end]
                    self._resume_if(len(self._early) <= HANDSHAKE_LIMIT)
                    return body
            if self.lost.done():
                raise ConnectionError("The peer closed the connection during the handshake.")
            await self._more()

    def unlock(self) -> None:
        """The peer is known: from now on frames of any legal length come as fast as they like."""
        self._splitter = FrameSplitter()
        early, self._early = bytes(self._early), bytearray()
        self._split(early)
        self._resume_if(self._queued_bytes <= self._max_buffer)

    async def next_body(self) -> bytes | None:
        """The next frame, or None at the end (`fault` says if a bad frame was the end)."""
        while not self._bodies:
            if self.fault is not None or self.lost.done():
                return None
            await self._more()
        body = self._bodies.popleft()
        self._queued_bytes -= len(body)
        self._resume_if(self._queued_bytes <= self._max_buffer // 2)
        return body

    def drop_incoming(self) -> None:
        self._bodies.clear()
        self._queued_bytes = 0

    def _split(self, data: bytes) -> None:
        assert self._splitter is not None
        try:
            bodies = self._splitter.feed(data)
        except ProtocolError as error:
            self.fault = error
            self.transport.abort()
            return
        self._bodies.extend(bodies)
        self._queued_bytes += sum(map(len, bodies))
        self._pause_if(self._queued_bytes > self._max_buffer)

    def _pause_if(self, full: bool) -> None:
        if full and self._reading and not self.transport.is_closing():
            self._reading = False
            self.transport.pause_reading()

    def _resume_if(self, room: bool) -> None:
        if room and not self._reading and not self.transport.is_closing():
            self._reading = True
            self.transport.resume_reading()

    async def _more(self) -> None:
        """Until something arrived or the connection ended. One reader at a time."""
        if self._arrival is not None:
            raise RuntimeError("Only one task may read from a channel.")
        self._arrival = self._loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # outgoing

    def write(self, frame: bytes) -> None:
        """Send with everything else of this tick. Raises ConnectionError once closed."""
        if self.transport.is_closing():
            raise ConnectionError("The connection is closed.")
        waiting = self._outgoing_bytes + self.transport.get_write_buffer_size()
        if waiting > self._max_buffer:
            self.transport.abort()
            raise ConnectionError(
                f"The peer left {waiting} bytes unread (limit {self._max_buffer}) and was cut off."
            )
        if not self._outgoing:
            self._loop.call_soon(self.flush)
        self._outgoing.append(frame)
        self._outgoing_bytes += len(frame)

    def flush(self) -> None:
        if self._outgoing and not self.transport.is_closing():
            self.transport.write(
                b"".join(self._outgoing) if len(self._outgoing) > 1 else self._outgoing[0]
            )
        self._outgoing.clear()
        self._outgoing_bytes = 0

    async def close(self) -> None:
        """Flush, close, and give up on a peer that does not take the rest within a second."""
        self.flush()
        self.transport.close()
        self._wake()
        await asyncio.wait([self.lost], timeout=CLOSE_TIMEOUT_S)
        if not self.lost.done():
            self.transport.abort()


class Channel:
    """One authenticated connection; made by `connect` and by `ChannelServer`.

    Iterate over it (one task) for the decoded messages. The iteration ends when either side closes;
    a frame that breaks the protocol is logged, closes the channel and ends the iteration.
    """

    def __init__(
        self, stream: _FrameStream, decoder: MessageDecoder[Any], peer: str, epoch: int
    ) -> None:
        self.peer = peer
        """Worker id (client side) or the client's name (server side)."""
        self.epoch = epoch
        """The server's epoch, on both sides."""
        self._stream = stream
        self._decoder = decoder

    @property
    def closed(self) -> bool:
        return self._stream.transport.is_closing()

    def send(self, message: msgspec.Struct) -> None:
        """Buffer a message; it leaves at the end of this tick of the event loop. Never waits.

        Raises ConnectionError once the channel is closed, or if the peer has left more than the
        buffer's limit unread: then it is cut off.
        """
        self._stream.write(encode_frame(message))

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        body = await self._stream.next_body()
        if body is None:
            if self._stream.fault is not None:
                log.error("Closed the channel with %s: %s", self.peer, self._stream.fault)
            raise StopAsyncIteration
        try:
            return self._decoder.decode(body)
        except ProtocolError as error:
            log.error("Closed the channel with %s: %s", self.peer, error)
            await self.close()
            raise StopAsyncIteration from None

    def abort(self) -> None:
        """Close at once, whatever is buffered."""
        self._stream.transport.abort()

    async def close(self) -> None:
        """Send what is buffered and close. Idempotent."""
        self._stream.drop_incoming()
        await self._stream.close()


async def connect(
    host: str,
    port: int,
    *,
    secret: str,
    name: str,
    receives: Any,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    max_buffer: int = MAX_BUFFER_BYTES,
) -> Channel:
    """Open a channel to a worker; `receives` is the (union of) message types that it may send.

    Raises ConnectionError if nobody answers in time, AuthenticationError if one side does not know
    the secret, ProtocolError if the other side speaks something else.
    """
    loop = asyncio.get_running_loop()
    stream: _FrameStream | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, stream = await loop.create_connection(lambda: _FrameStream(max_buffer), host, port)
            asked = await _introduce(stream, secret, name)
    except (OSError, TimeoutError) as error:
        if stream is not None:
            stream.transport.abort()
        reason = str(error) or f"no answer within {timeout_s:g} s"
        raise ConnectionError(f"Cannot open a channel to {host}:{port}: {reason}.") from error
    except BaseException:
        if stream is not None:
            stream.transport.abort()
        raise
    return Channel(stream, MessageDecoder(receives), asked.worker_id, asked.epoch)


async def _introduce(stream: _FrameStream, secret: str, name: str) -> Challenge:
    """The client's side of the handshake."""
    asked = _HANDSHAKE.decode(await stream.handshake_frame())
    if not isinstance(asked, Challenge):
        raise ProtocolError("The peer did not begin with a challenge.")
    proof = prove(secret, asked, name)
    stream.write(encode_frame(proof))
    try:
        answer = _HANDSHAKE.decode(await stream.handshake_frame())
    except ConnectionError:
        raise AuthenticationError(
            f"{asked.worker_id} refused the handshake: the secrets differ, or it has too many "
            "connections waiting."
        ) from None
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"{asked.worker_id} answered the proof with something else.")
    check_welcome(secret, asked, proof, answer)
    stream.unlock()
    return asked


class ChannelServer:
    """Listens, checks who comes, and runs `on_channel` for each channel in a task of its own.

    When `on_channel` returns or raises, its channel is closed.
    """

    def __init__(
        self,
        *,
        secret: str,
        worker_id: str,
        epoch: int,
        receives: Any,
        on_channel: Callable[[Channel], Awaitable[None]],
        host: str,
        port: int = 0,
        max_buffer: int = MAX_BUFFER_BYTES,
    ) -> None:
        self.host = host
        self.port = port
        """After `start()` the port it listens on, also if 0 (any) was asked for."""
        self._secret = secret
        self._worker_id = worker_id
        self._epoch = epoch
        self._decoder = MessageDecoder[Any](receives)
        self._on_channel = on_channel
        self._max_buffer = max_buffer
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        address = found[0][4]
        self._server = await loop.create_server(self._accept, str(address[0]), int(address[1]))
        self.port = self._server.sockets[0].getsockname()[1]

    async def begin(self, epoch: int) -> None:
        """Become another incarnation: every channel is closed, and whoever comes meets `epoch`."""
        self._epoch = epoch
        await self._part()

    async def close(self) -> None:
        """Stop listening and close every channel. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        while self._tasks:
            await self._part()

    async def _part(self) -> None:
        """Close the channels that there are."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _accept(self) -> _FrameStream:
        return _FrameStream(self._max_buffer, self._begin)

    def _begin(self, stream: _FrameStream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: _FrameStream) -> None:
        try:
            channel = await self._meet(stream)
            if channel is not None:
                await self._on_channel(channel)
        except Exception:
            log.exception("The handler of a channel failed")
        finally:
            stream.drop_incoming()
            await stream.close()

    async def _meet(self, stream: _FrameStream) -> Channel | None:
        """The server's side of the handshake; None if the peer did not pass it."""
        if self._strangers >= MAX_STRANGERS:
            log.warning("Refused a connection: %d are waiting for a handshake", self._strangers)
            return None
        self._strangers += 1
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                name = await self._authenticate(stream)
        except (ProtocolError, ConnectionError, TimeoutError) as error:
            peer = stream.transport.get_extra_info("peername")
            log.warning("Refused a connection from %s: %s", peer, str(error) or "it took too long.")
            return None
        finally:
            self._strangers -= 1
        return Channel(stream, self._decoder, name, self._epoch)

    async def _authenticate(self, stream: _FrameStream) -> str:
        asked = challenge(self._worker_id, self._epoch)
        stream.write(encode_frame(asked))
        proof = _HANDSHAKE.decode(await stream.handshake_frame())
        if not isinstance(proof, Proof):
            raise ProtocolError("The peer answered the challenge with something else.")
        verdict = welcome(self._secret, asked, proof)
        stream.unlock()
        stream.write(encode_frame(verdict))
        return proof.name
