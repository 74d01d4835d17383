"""A device's streams, as the transports between devices use them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


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
