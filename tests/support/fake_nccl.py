"""`cupy.cuda.nccl` for tests without a GPU: the same calls, between two ends in one process.

A communicator blocks in its constructor until both ranks have come; `send` and `recv` return at
once and the bytes move when both have been posted. `Misbehaviour` says what goes wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import secrets
import threading
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field


class NcclError(RuntimeError):
    """What CuPy raises."""


@dataclass
class Misbehaviour:
    """Switches for tests; all may be changed at any time."""

    stuck_transfers: bool = False
    """What is posted is never done."""
    stuck_joins: bool = False
    """Constructors do not return."""
    stuck_aborts: bool = False
    failing: bool = False
    """`send` and `recv` raise."""
    async_error: bool = False
    let_go: threading.Event = field(default_factory=threading.Event)
    """Frees all that is stuck (for the end of a test)."""


@dataclass(eq=False)
class _Operation:
    address: int
    nbytes: int
    done: bool = False


@dataclass
class _Meeting:
    """Two ranks of one session."""

    come: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    sends: deque[_Operation] = field(default_factory=deque)
    receives: deque[_Operation] = field(default_factory=deque)


class FakeNccl:
    """Stands for the module."""

    NCCL_UINT8 = 1

    def __init__(self, version: int = 23003) -> None:
        self.version = version
        self.misbehaviour = Misbehaviour()
        self.joined: list[tuple[bytes, int]] = []
        self.aborted: list[tuple[bytes, int]] = []
        self.streams = FakeStreams()
        self.meetings: dict[bytes, _Meeting] = {}
        self.lock = threading.Lock()

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def operation(self) -> _Operation:
        """One that is not done; whoever has it says when it is."""
        return _Operation(0, 0)

    def NcclCommunicator(self, ndev: int, session: bytes, rank: int) -> _Communicator:
        assert ndev == 2 and len(session) == 128
        return _Communicator(self, session, rank)


class _Communicator:
    def __init__(self, module: FakeNccl, session: bytes, rank: int) -> None:
        self._module, self._session, self._rank = module, session, rank
        assert (session, rank) not in module.joined, "a rank joined a session twice"
        with module.lock:
            self._meeting = module.meetings.setdefault(session, _Meeting())
        if module.misbehaviour.stuck_joins:
            module.misbehaviour.let_go.wait(60)
            raise NcclError("let go")
        with self._meeting.changed:
            self._meeting.come += 1
            self._meeting.changed.notify_all()
            if not self._meeting.changed.wait_for(lambda: self._meeting.come == 2, 60):
                raise NcclError("NCCL_ERROR_SYSTEM_ERROR: nobody came")
        module.joined.append((session, rank))

    def send(self, address: int, nbytes: int, kind: int, peer: int, stream: int) -> None:
        self._post(self._meeting.sends, address, nbytes, kind, peer, stream)

    def recv(self, address: int, nbytes: int, kind: int, peer: int, stream: int) -> None:
        self._post(self._meeting.receives, address, nbytes, kind, peer, stream)

    def _post(
        self, where: deque[_Operation], address: int, nbytes: int, kind: int, peer: int, stream: int
    ) -> None:
        assert kind == FakeNccl.NCCL_UINT8 and peer == 1 - self._rank
        if self._module.misbehaviour.failing:
            raise NcclError("NCCL_ERROR_INTERNAL_ERROR")
        operation = _Operation(address, nbytes)
        self._module.streams.add(stream, operation)
        if self._module.misbehaviour.stuck_transfers:
            return
        meeting = self._meeting
        with meeting.changed:
            where.append(operation)
            while meeting.sends and meeting.receives:
                sent, received = meeting.sends.popleft(), meeting.receives.popleft()
                assert sent.nbytes == received.nbytes, "a mismatch would hang"
                ctypes.memmove(received.address, sent.address, sent.nbytes)
                sent.done = received.done = True

    def check_async_error(self) -> None:
        if self._module.misbehaviour.async_error:
            raise KeyError(7)  # as CuPy does for codes that it does not know

    def abort(self) -> None:
        if self._module.misbehaviour.stuck_aborts:
            self._module.misbehaviour.let_go.wait(60)
        self._module.aborted.append((self._session, self._rank))


class FakeStreams:
    """Streams of the host: work is done when it is launched, but for communication."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._operations: dict[int, list[_Operation]] = {}

    def enter(self) -> None:
        pass

    def new(self) -> int:
        number = next(self._numbers)
        self._operations[number] = []
        return number

    def handle(self, stream: int) -> int:
        return stream

    def on(self, stream: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self, stream: int, operation: _Operation) -> None:
        self._operations[stream].append(operation)

    def add_to_all(self, operation: _Operation) -> None:
        for operations in self._operations.values():
            operations.append(operation)

    def mark(self, stream: int) -> _Mark:
        return _Mark(list(self._operations[stream]))


@dataclass(frozen=True)
class _Mark:
    operations: list[_Operation]

    def query(self) -> bool:
        return all(operation.done for operation in self.operations)
