"""Checksums of blocks computed on the device where they lie (`pdserve.kernels.sums`): those of the
transports between devices, since xxh3 would carry every byte to the host.

Waits are polls of an event under a transfer's deadlines. A kernel that was launched writes into the
targets, so who is cancelled or late still waits for its end before it says so; only a device that
does nothing for `LOST_S` is given up, and the worker with it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pdserve.kernels import copy_blocks_summed, sum_blocks
from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.memory import Numbers
from pdserve.kv_transfer.streams import Streams
from pdserve.kv_transfer.transports import TransportUnfit, Wait

log = logging.getLogger(__name__)

KIND = "words"
"""What these checksums are called beside the host's."""
WORD = 8
"""Bytes; blocks must be whole numbers of words."""
SUM_S = 5.0
"""The checksums of a fetch take no longer than this."""
WARM_UP_S = 60.0
LOST_S = 60.0
SPIN_S = 0.0003
"""So long after a launch whether it is done is asked without a pause: most are by then, and a pause
takes twice as long as it is asked to."""
POLL_S = 0.00005
STAGED_BYTES = 64 * 2**10
"""The driver takes that many out of ordinary memory at once, which is sooner than to pin them; for
more it waits until the stream has come so far."""


def has_words(pool: DeviceMemory) -> bool:
    """Whether the blocks can be summed on the device."""
    return pool.block_nbytes % WORD == 0 and pool.blocks.data_ptr() % WORD == 0


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """Sums on their way to the host."""

    sums: torch.Tensor
    mark: Any

    def wait(self, wait: Wait) -> Sums:
        """Until they are there. What `wait` raises is raised when the device is done. Raises
        TransportUnfit."""
        _wait_until_done(self.mark, wait)
        return numbers(self.sums)

    def settle(self) -> None:
        """Until the device is done with this and all that the thread launched before, or is lost,
        whatever becomes of the sums."""
        with contextlib.suppress(TransportUnfit):
            _wait_until_done(self.mark, lambda: float("inf"))


class DeviceSums:
    """What launches on a stream of the calling thread's own and waits for the sums that come of it.
    For a pool that `has_words`."""

    def __init__(self, pool: DeviceMemory, streams: Streams) -> None:
        self.words = pool.blocks.view(torch.int64)
        """[N, words of a block], the pool itself."""
        self._streams = streams
        self._local = threading.local()

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """As `Pool.digests`, of this kind. Raises TransportUnfit."""
        until = time.monotonic() + SUM_S
        launched = self.launch(lambda: sum_blocks(self.words, self.index(block_ids)[0]))
        return launched.wait(lambda: until)

    def warm_up(self) -> None:
        """Sum block 0, then copy it onto itself, so that no transfer waits for a compiler. Before
        anybody owns a block. Raises TransportUnfit."""
        until = time.monotonic() + WARM_UP_S
        self.launch(lambda: sum_blocks(self.words, self.index([0])[0])).wait(lambda: until)

        def copies() -> torch.Tensor:
            theirs, mine = self.index([0], [0])
            return copy_blocks_summed(self.words, theirs, self.words, mine)

        self.launch(copies).wait(lambda: until)

    def launch(self, kernel: Callable[[], torch.Tensor]) -> Launched:
        """Launch what computes sums [n] int64, after what was launched by this thread before.
        Raises TransportUnfit."""
        if not hasattr(self._local, "stream"):
            self._streams.enter()
            self._local.stream = self._streams.new()
        stream = self._local.stream
        try:
            with self._streams.on(stream):
                return Launched(to_host(kernel()), self._streams.mark(stream))
        except RuntimeError as error:  # CUDA's, through torch
            raise TransportUnfit(f"The device cannot sum or copy blocks: {error}") from error

    def index(self, *rows: Numbers) -> torch.Tensor:
        """Numbers of blocks [rows, n] on the device, without waiting until they are there."""
        return index_of(rows, self.words.device)


def index_of(rows: Sequence[Numbers], device: torch.device) -> torch.Tensor:
    """Numbers [rows, n] int64 on a device, without waiting until they are there."""
    index = torch.from_numpy(np.asarray(rows, np.int64))
    if device.type == "cuda" and index.nbytes > STAGED_BYTES:
        index = torch.empty_like(index, pin_memory=True).copy_(index)
    return index.to(device, non_blocking=True)


def to_host(found: torch.Tensor) -> torch.Tensor:
    """Sums on their way to the host: there when the stream has come so far."""
    sums = torch.empty(found.shape, dtype=torch.int64, pin_memory=found.is_cuda)
    return sums.copy_(found, non_blocking=True)


def numbers(sums: torch.Tensor) -> Sums:
    """As unsigned numbers, which is what a header holds. sums: [n] int64 on the host."""
    found: Sums = sums.numpy().view(np.uint64)
    return found


def _wait_until_done(mark: Any, wait: Wait) -> None:
    begun = time.monotonic()
    lost = begun + LOST_S
    deadline, ended = lost, None
    while not mark.query():
        now = time.monotonic()
        if now - begun < SPIN_S:
            time.sleep(0)  # whoever else wants the interpreter
            continue
        if ended is None:
            try:
                deadline = min(deadline, wait())
                if now >= deadline:
                    raise TransportUnfit("A copy between devices did not end in time.")
            except Exception as error:
                ended = error
        if now >= lost:
            log.critical("The device has not finished a copy for %.0f s; it is lost.", LOST_S)
            raise TransportUnfit(f"The device has not finished a copy for {LOST_S:g} s.")
        time.sleep(POLL_S)
    if ended is not None:
        raise ended
