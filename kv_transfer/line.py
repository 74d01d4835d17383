"""A line: one authenticated connection between a sink and a source, with blocking sockets.

Every wait has a deadline (time.monotonic seconds). A line belongs to one thread at a time; only
`interrupt` may be called from another. Whatever goes wrong raises OSError (TimeoutError and
ConnectionError are OSErrors) or ProtocolError, and the line must then be closed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pdserve.protocol.errors import ProtocolError
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
from pdserve.protocol.ticket import KVTicket
from pdserve.protocol.wire import HEADER, MessageDecoder, body_length, encode_frame

REQUEST_LIMIT = 4 * 2**20
"""Longest frame a source accepts: a fetch of half a million blocks."""
REPLY_LIMIT = 16 * 2**20
"""Longest frame a sink accepts."""
BUFFERS_PER_CALL = 512
"""Arrays given to one sendmsg; the kernel takes at most 1024."""

LOCAL_SEND_BYTES = 256 * 2**10
"""The send buffer of a line within one host. Left to itself it grows to some MiB, all of which the
sender fills before it makes room for the reader, and out of the caches; over a network it must hold
what is on its way. 128 KiB to 2 MiB were tried (bench/LOG.md)."""

STOP_CHECK_S = 0.2
"""A sender whose peer does not read looks this often whether to stop."""

_HANDSHAKE: MessageDecoder[Any] = MessageDecoder(Handshake)

T = TypeVar("T")


class LineClosed(ConnectionError):
    """The peer closed the line between two frames."""


class EpochChanged(ConnectionError):
    """Another incarnation (or another worker) answers at the ticket's address."""


class Line:
    """Frames and raw bytes on one socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError, having closed the socket, if the connection has ended already."""
        self._sock = sock
        self.peer = ""
        """The other side's name, once it has proved itself."""
        self.keeps: dict[str, object] = {}
        """What is held open as long as this line: the peer's pool and its ledger, mapped."""
        self.kept: deque[Any] = deque()
        """Messages that came while another one was awaited; whoever serves the line takes them."""
        self.idle_since = 0.0
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sock.getsockname()[0] == sock.getpeername()[0]:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BYTES)
        except OSError:  # the peer has left already
            sock.close()
            raise

    def send(self, message: Any, deadline: float) -> None:
        self._until(deadline)
        self._sock.sendall(encode_frame(message))

    def send_buffers(self, buffers: Sequence[Any], wait: Callable[[], float]) -> None:
        """Send byte arrays, without copying them. `wait()` gives the deadline by which the next
        bytes must be gone, and may raise to stop; it is asked at least every STOP_CHECK_S."""
        rest = [memoryview(buffer) for buffer in buffers]
        start, deadline = 0, wait()
        while start < len(rest):
            self._until(min(deadline, time.monotonic() + STOP_CHECK_S))
            try:
                sent = self._sock.sendmsg(rest[start : start + BUFFERS_PER_CALL])
            except TimeoutError:
                wait()
                if time.monotonic() >= deadline:
                    raise
                continue
            deadline = wait()
            while start < len(rest) and sent >= rest[start].nbytes:
                sent -= rest[start].nbytes
                start += 1
            if sent:
                rest[start] = rest[start][sent:]

    def receive(
        self,
        decoder: MessageDecoder[T],
        deadline: float,
        limit: int = REPLY_LIMIT,
        frame_s: float | None = None,
    ) -> T:
        """One message by `deadline`; or, if `frame_s` is given, one that begins by `deadline` and
        is complete `frame_s` seconds after its first byte."""
        header = bytearray(HEADER.size)
        self._until(deadline)
        if not self._sock.recv_into(memoryview(header)[:1]):
            raise LineClosed("The peer closed the connection.")
        whole = deadline if frame_s is None else time.monotonic() + frame_s
        self.receive_into(memoryview(header)[1:], lambda: whole)
        body = bytearray(body_length(header, limit))
        self.receive_into(memoryview(body), lambda: whole)
        return decoder.decode(memoryview(body))

    def receive_into(self, target: memoryview, wait: Callable[[], float]) -> None:
        """Fill `target`. `wait()` gives the deadline of the next wait and may raise to stop."""
        received = 0
        while received < len(target):
            self._until(wait())
            count = self._sock.recv_into(target[received:])
            if not count:
                raise ProtocolError("The connection ended in the middle of a frame.")
            received += count

    def interrupt(self) -> None:
        """End every wait on this line at once. From any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def dead(self) -> bool:
        """Whether an idle line is of no more use: ended, or the peer said something unasked."""
        try:
            self._sock.setblocking(False)
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self.keeps.clear()
        self._sock.close()

    def _until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("A wait on the transfer connection took too long.")
        self._sock.settimeout(left)


def answer_handshake(line: Line, *, secret: str, worker_id: str, epoch: int) -> None:
    """The source's part. Sets `line.peer`; raises AuthenticationError for a stranger."""
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    asked = challenge(worker_id, epoch)
    line.send(asked, deadline)
    proof = line.receive(_HANDSHAKE, deadline, HANDSHAKE_LIMIT)
    if not isinstance(proof, Proof):
        raise ProtocolError("The peer did not answer the challenge.")
    line.send(welcome(secret, asked, proof), deadline)
    line.peer = proof.name


@dataclass(frozen=True, slots=True)
class Address:
    """A source, in one epoch, and where it listens."""

    host: str
    port: int
    source: str
    epoch: int

    @staticmethod
    def of(ticket: KVTicket) -> Address:
        return Address(ticket.host, ticket.port, ticket.source, ticket.epoch)


Attach = Callable[[Line], None]
"""Told of a line as soon as it exists, before any wait on it, so that it can be interrupted."""


def connect(address: Address, *, secret: str, name: str, deadline: float, attach: Attach) -> Line:
    """The sink's part. Raises EpochChanged if not the source in the epoch meant answers."""
    deadline = min(deadline, time.monotonic() + HANDSHAKE_TIMEOUT_S)
    timeout = deadline - time.monotonic()
    if timeout <= 0:
        raise TimeoutError(f"No time is left to connect to {address.source}.")
    try:
        sock = socket.create_connection((address.host, address.port), timeout=timeout)
    except (UnicodeError, OverflowError) as error:
        raise ConnectionError(f"{address.host}:{address.port} is no address: {error}") from None
    line = Line(sock)
    try:
        attach(line)
        asked = line.receive(_HANDSHAKE, deadline, HANDSHAKE_LIMIT)
        if not isinstance(asked, Challenge):
            raise ProtocolError("The peer did not open with a challenge.")
        proof = prove(secret, asked, name)
        line.send(proof, deadline)
        answer = line.receive(_HANDSHAKE, deadline, HANDSHAKE_LIMIT)
        if not isinstance(answer, Welcome):
            raise ProtocolError("The peer did not welcome this process.")
        check_welcome(secret, asked, proof, answer)
        if (asked.worker_id, asked.epoch) != (address.source, address.epoch):
            raise EpochChanged(
                f"{asked.worker_id} in epoch {asked.epoch} answers at {address.host}:"
                f"{address.port}, where the ticket means {address.source} in epoch "
                f"{address.epoch}: the source was restarted and its blocks are gone."
            )
        line.peer = asked.worker_id
    except BaseException:
        line.close()
        raise
    return line


class LinePool:
    """A sink's idle lines, by source and epoch. Thread-safe."""

    def __init__(self, *, secret: str, name: str) -> None:
        self._secret = secret
        self._name = name
        self._lock = threading.Lock()
        self._idle: dict[Address, list[Line]] = {}
        self._closed = False

    @contextlib.contextmanager
    def line(self, address: Address, deadline: float, attach: Attach) -> Iterator[Line]:
        """An idle line or a new one. It goes back to the pool if the block ends normally, so end
        it so only when no answer is outstanding; otherwise the line is closed."""
        line = self._take(address)
        if line is None:
            line = self._connect(address, deadline, attach)
        else:
            attach(line)
        try:
            yield line
        except BaseException:
            line.close()
            raise
        self._put(address, line)

    def sweep(self, idle_s: float) -> bool:
        """Close idle lines that ended or were not used for `idle_s` seconds, and with them the
        mappings of pools whose owner died. Returns whether idle lines are left."""
        before = time.monotonic() - idle_s
        useless: set[Line] = set()
        with self._lock:
            for address, lines in list(self._idle.items()):
                kept = [line for line in lines if line.idle_since > before and not line.dead()]
                useless.update(set(lines).difference(kept))
                if kept:
                    self._idle[address] = kept
                else:
                    del self._idle[address]
            left = bool(self._idle)
        for line in useless:  # without the lock: to unmap a pool takes a while
            line.close()
        return left

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle = [line for lines in self._idle.values() for line in lines]
            self._idle.clear()
        for line in idle:
            line.close()

    def _take(self, address: Address) -> Line | None:
        while True:
            with self._lock:
                lines = self._idle.get(address)
                line = lines.pop() if lines else None
            if line is None or not line.dead():
                return line
            line.close()

    def _put(self, address: Address, line: Line) -> None:
        line.idle_since = time.monotonic()
        with self._lock:
            if not self._closed:
                self._idle.setdefault(address, []).append(line)
                return
        line.close()

    def _connect(self, address: Address, deadline: float, attach: Attach) -> Line:
        line = connect(
            address, secret=self._secret, name=self._name, deadline=deadline, attach=attach
        )
        self._forget_other_epochs(address)
        return line

    def _forget_other_epochs(self, address: Address) -> None:
        """What is known of a source's other epochs is of no use once this one has answered."""
        with self._lock:
            stale = [
                other
                for other in self._idle
                if other.source == address.source and other.epoch != address.epoch
            ]
            lines = [line for other in stale for line in self._idle.pop(other)]
        for line in lines:
            line.close()


class Complaints:
    """Log lines about strangers' mistakes, at most one a second: a flood must not fill a disk."""

    def __init__(self, logger: logging.Logger, interval_s: float = 1.0) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._next = 0.0
        self._hidden = 0
        self.count = 0
        """All complaints so far, shown or not."""

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            self.count += 1
            if now < self._next:
                self._hidden += 1
                return
            hidden, self._hidden = self._hidden, 0
            self._next = now + self._interval_s
        more = f" ({hidden} more since the last such line)" if hidden else ""
        self._logger.warning("%s%s", text, more)
