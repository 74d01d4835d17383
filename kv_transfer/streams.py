"""What the transports between devices share: streams, and whether they can be had at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.memory import Pool
from pdserve.kv_transfer.transports import TransportSettingError, TransportUnfit

log = logging.getLogger(__name__)

T = TypeVar("T")
Half = TypeVar("Half")


class Streams(Protocol):
    """What is needed of a device's streams."""

    def enter(self) -> None:
        """Called once by a thread that is going to make NCCL calls."""

    def new(self) -> Any:
        """A stream of its own, that waits for no other."""

    def handle(self, stream: Any) -> int: ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """What is launched inside goes to this stream."""

    def mark(self, stream: Any) -> Any:
        """An object whose `query()` says whether all that is in the stream now is done."""


class CudaStreams:
    """Those of a CUDA device, through torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def enter(self) -> None:
        torch.cuda.set_device(self._device)

    def new(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def handle(self, stream: torch.cuda.Stream) -> int:
        return int(stream.cuda_stream)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


def opened(name: str, pool: object, transport: str, make: Callable[[DeviceMemory], T]) -> T | None:
    """What `make` gives for this pool if the setting `transport` allows the transport `name` and
    the process has what it takes; else None, and a line in the log says why. `make` raises
    TransportUnfit. Raises TransportSettingError if the transport is asked for and cannot be had."""
    if transport not in ("auto", name):
        return None
    try:
        if not isinstance(pool, DeviceMemory):
            raise TransportUnfit(
                f"The transport {name} joins GPUs; this worker's KV pool is on none."
            )
        return make(pool)
    except TransportUnfit as error:
        if transport == name:
            raise TransportSettingError(f"{error} Choose another --transport.") from None
        if isinstance(pool, DeviceMemory):
            log.info("%s Blocks travel without it.", error)
        return None


def with_first(
    name: str,
    means: T | None,
    make: Callable[[DeviceMemory, T], Half],
    others: Mapping[str, Callable[[Pool], Half]],
) -> dict[str, Callable[[Pool], Half]]:
    """`others`, after the transport `name` if the means for it are there."""
    if means is None:
        return dict(others)

    def on_device(pool: Pool) -> Half:
        assert isinstance(pool, DeviceMemory), f"{name} was opened for a pool on a device"
        return make(pool, means)

    return {name: on_device, **others}
