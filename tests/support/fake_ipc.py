"""CUDA IPC for tests without a GPU: a runtime whose allocations are tensors of this process."""

from __future__ import annotations

import ctypes
import itertools
import secrets
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch


@dataclass
class Trouble:
    """Switches for tests; all may be changed at any time."""

    far: bool = False
    """The two devices cannot read each other's memory."""
    failing: bool = False
    """Opening raises."""
    stuck: bool = False
    """What is launched is not done before `let_go`."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Somebody has waited for something stuck."""
    let_go: threading.Event = field(default_factory=threading.Event)


class FakeRuntime:
    """One per process that a test plays; `driver` is what they share."""

    def __init__(self, driver: FakeDriver, bus_id: str, trouble: Trouble) -> None:
        self._driver, self._bus_id = driver, bus_id
        self.streams = FakeStreams(trouble)

    def bus_id(self) -> str:
        return self._bus_id

    def reaches(self, bus_id: str) -> bool:
        return bus_id == self._bus_id or not self._driver.trouble.far

    def share(self, tensor: torch.Tensor) -> tuple[bytes, int]:
        storage = tensor.untyped_storage()
        handle = secrets.token_bytes(64)
        self._driver.shared[handle] = storage
        return handle, tensor.data_ptr() - storage.data_ptr()

    def open(self, handle: bytes) -> int:
        if self._driver.trouble.failing:
            raise RuntimeError("cudaErrorMapBufferObjectFailed: mapping of buffer object failed")
        storage = self._driver.shared[handle]
        self._driver.opened.append(storage.data_ptr())
        return storage.data_ptr()

    def extent(self, address: int) -> int:
        return max(s.nbytes() for s in self._driver.shared.values() if s.data_ptr() == address)

    def close(self, address: int) -> None:
        self._driver.opened.remove(address)

    def words(self, address: int, shape: tuple[int, int]) -> torch.Tensor:
        buffer = (ctypes.c_int64 * (shape[0] * shape[1])).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.int64).view(shape)


class FakeDriver:
    def __init__(self) -> None:
        self.trouble = Trouble()
        self.shared: dict[bytes, torch.UntypedStorage] = {}
        self.opened: list[int] = []
        """Addresses of the mappings that are open."""

    def runtime(self, bus_id: str = "0000:01:00.0", *, sound: bool = False) -> FakeRuntime:
        """`sound`: what this process launches is never stuck."""
        return FakeRuntime(self, bus_id, Trouble() if sound else self.trouble)


class FakeStreams:
    """Work is done when it is launched, unless it is stuck."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble
        self._numbers = itertools.count(1)

    def enter(self) -> None:
        pass

    def new(self) -> int:
        return next(self._numbers)

    def handle(self, stream: int) -> int:
        return stream

    def on(self, stream: int) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self, stream: int) -> _Mark:
        return _Mark(self._trouble)


@dataclass(frozen=True)
class _Mark:
    trouble: Trouble

    def query(self) -> bool:
        if self.trouble.stuck:
            self.trouble.reached.set()
        return not self.trouble.stuck or self.trouble.let_go.is_set()
