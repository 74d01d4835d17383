"""A KV pool on a device: its blocks are copied through pinned host memory, a chunk at a time.

    device pool ──copy──► pinned buffer of the thread ──► socket, checksum
    device pool ◄──copy── pinned buffer of the thread ◄── socket, shared memory of another worker

Each transfer thread has its own buffer and its own stream, so that copies neither wait for the
engine's kernels nor hold them up. Whoever calls makes sure that the blocks are not being computed:
the engine offers blocks after the step that wrote them has given its tokens, or slices of them once
an event behind their layers has come, and reads fetched ones only after the report.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pdserve.kernels.digest import Bytes, Sums, digest_blocks
from pdserve.kv_transfer.memory import Pool, runs

STAGING_BYTES = 1 * 2**20
"""Of one thread's buffer; more if a single block is larger."""


class DeviceMemory(Pool):
    """The blocks of a pool tensor on any device. On the CPU it does the same without pinning."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """tensor: [N, ...], contiguous, any dtype. Raises ValueError for anything else."""
        if tensor.dim() < 2 or not tensor.is_contiguous() or not tensor.numel():
            raise ValueError(
                f"A pool must be a contiguous tensor of blocks. Given: {list(tensor.shape)} with "
                f"strides {tensor.stride()}."
            )
        self._blocks = tensor.view(tensor.shape[0], -1).view(torch.uint8)
        self._longest = max(1, STAGING_BYTES // self.block_nbytes)
        self._local = threading.local()

    @property
    def blocks(self) -> torch.Tensor:
        """[N, bytes of a block] uint8, the pool itself."""
        return self._blocks

    @property
    def num_blocks(self) -> int:
        return int(self._blocks.shape[0])

    @property
    def block_nbytes(self) -> int:
        return int(self._blocks.shape[1])

    @property
    def path(self) -> str:
        """Nobody can map a device's memory by a path."""
        return ""

    @property
    def nonce(self) -> bytes:
        return b""

    @property
    def in_place(self) -> bool:
        return False

    @property
    def longest(self) -> int:
        return self._longest

    def read(self, first: int, count: int = 1) -> Bytes:
        blocks, buffer = self._part(first, count)
        with self.stream():
            buffer.copy_(blocks, non_blocking=True)
        part: Bytes = buffer.view(-1).numpy()
        return part

    @contextlib.contextmanager
    def write(self, first: int, count: int = 1) -> Iterator[Bytes]:
        blocks, buffer = self._part(first, count)
        yield buffer.view(-1).numpy()
        with self.stream():
            blocks.copy_(buffer, non_blocking=True)

    def sliced(self, slices: int) -> DeviceMemory:
        return DeviceMemory(self._blocks.view(self.num_blocks * slices, -1))

    def digests(self, block_ids: Sequence[int]) -> Sums:
        sums = [np.empty(0, np.uint64)]
        for first, count in runs(block_ids, self._longest):
            part = self.read(first, count)
            sums.append(digest_blocks(part, range(count), self.block_nbytes))
        return np.concatenate(sums)

    def _part(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks first .. first + count - 1, as much of the thread's buffer), [count, bytes]."""
        if first < 0 or not 1 <= count <= self._longest or first + count > self.num_blocks:
            raise IndexError(
                f"Blocks {first}..{first + count - 1} lie outside a pool of {self.num_blocks}, or "
                f"are more than {self._longest} at once."
            )
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(
                (self._longest, self.block_nbytes),
                dtype=torch.uint8,
                pin_memory=self._blocks.is_cuda,
            )
        return self._blocks[first : first + count], self._local.buffer[:count]

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Run what is launched inside on the thread's own stream and wait until it is done."""
        if not self._blocks.is_cuda:
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._blocks.device)
        try:
            with torch.cuda.stream(self._local.stream):
                yield
        finally:  # what was launched before an error writes, too
            self._local.stream.synchronize()


def device_memory(tensor: torch.Tensor) -> DeviceMemory | None:
    """The transfer's view of a pool tensor that is not in host memory; None if it is."""
    return None if tensor.device.type == "cpu" else DeviceMemory(tensor)
