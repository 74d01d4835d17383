"""Who makes this process' NCCL calls: one thread at a time, under deadlines (see `nccl.py`)."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import torch

from pdserve.kv_transfer.streams import Streams
from pdserve.kv_transfer.transports import TransportUnfit
from pdserve.protocol.errors import PdserveError

log = logging.getLogger(__name__)

INIT_S = 10.0
ABORT_S = 5.0
LOST_THREADS = 2
MAX_CTAS = "4"
"""Of a communicator, unless the environment says otherwise: what it takes from the engine's GPU."""

T = TypeVar("T")


class NcclTrouble(PdserveError, ConnectionError):
    """NCCL failed, or did not come back in time."""


def load_nccl() -> Any:
    """CuPy's NCCL module. Raises TransportUnfit with a sentence if it cannot be had."""
    if not torch.cuda.is_available():
        raise TransportUnfit("NCCL needs a CUDA device, and this process sees none.")
    os.environ.setdefault("NCCL_MAX_CTAS", MAX_CTAS)
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise TransportUnfit(f"NCCL needs CuPy (extra `gpu`): {error}.") from None
    if not getattr(nccl, "available", True):
        raise TransportUnfit("CuPy finds no NCCL; install the package nvidia-nccl-cu13.")
    return nccl


class Owner:
    """The thread that makes this process' NCCL calls, and its successors."""

    def __init__(self, nccl: Any, streams: Streams, init_s: float = INIT_S) -> None:
        self.nccl, self.streams, self.init_s = nccl, streams, init_s
        self.version = int(nccl.get_version())
        self.lost = 0
        """Threads that did not come back, and communicators that could not be aborted."""
        self._lock = threading.Lock()
        self._start()

    @property
    def problem(self) -> str:
        """Why NCCL cannot be used any more; "" if it can."""
        if self.lost <= LOST_THREADS:
            return ""
        return f"NCCL did not come back from {self.lost} calls in this process."

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """Have the thread run `function` by `deadline`. Raises NcclTrouble."""
        if self.problem:
            raise NcclTrouble(self.problem)
        future: Future[T] = Future()
        orders = self._orders
        orders.put((function, future))
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            if not future.cancel():  # it has begun, so it is this call that is stuck
                self._replace(orders)
            raise NcclTrouble("NCCL did not come back from a call in time.") from None
        except Exception as error:  # NcclError; KeyError for codes that CuPy does not know
            raise NcclTrouble(f"NCCL failed: {error!r}.") from error

    def abort(self, communicator: Any) -> None:
        """Abort it without waiting for long."""
        helper = threading.Thread(
            target=self._abort, args=(communicator,), name="kv-nccl-abort", daemon=True
        )
        helper.start()
        helper.join(ABORT_S)
        if helper.is_alive():
            with self._lock:
                self.lost += 1  # its kernel may spin on the device for ever
            log.error("Aborting an NCCL communicator is stuck; it is left alone.")

    def _abort(self, communicator: Any) -> None:
        with contextlib.suppress(Exception):
            self.streams.enter()
            communicator.abort()

    def close(self) -> None:
        """Idempotent; does not wait for a call that is stuck."""
        self._orders.put(None)
        self._thread.join(ABORT_S)

    def _start(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(
            target=self._run, args=(self._orders,), name="kv-nccl", daemon=True
        )
        self._thread.start()

    def _replace(self, stuck: object) -> None:
        with self._lock:
            if self._orders is not stuck:
                return  # somebody else has noticed
            self.lost += 1
            self._orders.put(None)  # should it ever come back
            log.error("An NCCL call is stuck; its thread is given up (number %d).", self.lost)
            self._start()

    def _run(self, orders: queue.SimpleQueue[Any]) -> None:
        self.streams.enter()
        while (order := orders.get()) is not None:
            function, future = order
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
