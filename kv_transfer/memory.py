"""Pool memory as the transfer sees it: numbered blocks of equal size, back to back.

    file:  ┌─────────┬─────────┬─ ··· ─┬─────────────┬──────────────┐
           │ block 0 │ block 1 │       │ block N - 1 │ nonce (16 B) │
           └─────────┴─────────┴─ ··· ─┴─────────────┴──────────────┘

A pool that others on the host may read lies in a memfd. Best sealed with F_SEAL_SHRINK: a reader
of a mapping gets a bus error if the owner makes the file shorter, which nothing here ever does.
"""

from __future__ import annotations

import copy
import fcntl
import itertools
import mmap
import operator
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import numpy as np

from pdserve.kernels.digest import Bytes, Sums, digest_blocks
from pdserve.protocol.errors import PdserveError

NONCE_BYTES = 16
"""The last bytes of a pool's file: random, so that a path that names another file is noticed."""
HOST_SUMS = "xxh3"
"""What the pools' own checksums are called."""
Numbers: TypeAlias = Sequence[int] | np.ndarray[Any, np.dtype[Any]]
"""Of blocks."""

_POOL_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")


class PoolError(PdserveError):
    """A pool cannot be opened or is not the one that was meant."""


class BlockMemory(Protocol):
    """What the transfer needs from a KV pool; the engine's pool has this shape.

    All blocks lie back to back in block order: view(i + 1) begins where view(i) ends.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: all layers, keys and values."""

    @property
    def path(self) -> str:
        """/proc/<pid>/fd/<n> of a memfd laid out as drawn above, or "" if nobody can map it."""

    @property
    def nonce(self) -> bytes:
        """NONCE_BYTES random bytes, also the last ones of the file."""

    def view(self, block_id: int) -> memoryview:
        """One block, writable, contiguous, block_nbytes long."""


class Pool(Protocol):
    """Blocks as the transports use them, wherever they lie: here or on a device."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_nbytes(self) -> int: ...

    @property
    def path(self) -> str:
        """See BlockMemory."""

    @property
    def nonce(self) -> bytes:
        """See BlockMemory."""

    @property
    def in_place(self) -> bool:
        """Whether `read` and `write` give the blocks themselves, valid as long as the pool. If
        not, they give a copy that is valid until the thread's next call of `read`, `write` or
        `digests`, and `count` may be at most `longest`."""

    @property
    def longest(self) -> int:
        """Most blocks that `read` and `write` take at once."""

    def read(self, first: int, count: int = 1) -> Bytes:
        """The bytes of blocks first .. first + count - 1. Raises IndexError outside the pool."""

    def write(self, first: int, count: int = 1) -> AbstractContextManager[Bytes]:
        """Where to put such blocks' bytes; they are in the pool when the block ends normally."""

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """xxh3-64 of each of the blocks, as they lie in the pool."""

    def sliced(self, slices: int) -> Pool:
        """The same memory as blocks of a `slices`-th of the size (see `slices.py`)."""


class HostMemory:
    """A pool in an anonymous memfd of this process; zeroed. For tests and benchmarks."""

    def __init__(self, num_blocks: int, block_nbytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_nbytes = block_nbytes
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        size = num_blocks * block_nbytes + NONCE_BYTES
        self._fd = os.memfd_create("pdserve-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self._fd, size)
        self._map[-NONCE_BYTES:] = self.nonce
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def all(self) -> memoryview:
        """All blocks, back to back."""
        return memoryview(self._map)[:-NONCE_BYTES]

    def view(self, block_id: int) -> memoryview:
        start = block_id * self.block_nbytes
        return memoryview(self._map)[start : start + self.block_nbytes]

    def close(self) -> None:
        """Close the file; the mapping goes with the last view of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Spans(Pool):
    """A host pool's blocks as arrays over several adjacent blocks at once, without copying.

    Keeps the pool alive as long as it lives itself. Raises ValueError if the pool's blocks do not
    lie back to back.
    """

    def __init__(self, memory: BlockMemory) -> None:
        self.memory = memory
        self._num_blocks = memory.num_blocks
        self._block_nbytes = memory.block_nbytes
        first = np.frombuffer(memory.view(0), np.uint8)
        last = np.frombuffer(memory.view(self.num_blocks - 1), np.uint8)
        distance = last.ctypes.data - first.ctypes.data
        if len(first) != self.block_nbytes or len(last) != self.block_nbytes:
            raise ValueError(f"A view of a block must be {self.block_nbytes} bytes long.")
        if distance != (self.num_blocks - 1) * self.block_nbytes:
            raise ValueError("The pool's blocks must lie back to back, in block order.")
        # In bounds because of the two checks above: from the first block's start to the last's end.
        self._all: Bytes = np.lib.stride_tricks.as_strided(
            first, shape=(self.num_blocks * self.block_nbytes,), strides=(1,)
        )

    def sliced(self, slices: int) -> Spans:
        other = copy.copy(self)
        other._num_blocks = self._num_blocks * slices
        other._block_nbytes = self._block_nbytes // slices
        return other

    def span(self, first: int, count: int = 1) -> Bytes:
        """Blocks first .. first + count - 1. Raises IndexError outside the pool."""
        if first < 0 or count < 1 or first + count > self.num_blocks:
            raise IndexError(
                f"Blocks {first}..{first + count - 1} lie outside a pool of {self.num_blocks}."
            )
        start = first * self.block_nbytes
        return self._all[start : start + count * self.block_nbytes]

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_nbytes(self) -> int:
        return self._block_nbytes

    @property
    def path(self) -> str:
        return self.memory.path

    @property
    def nonce(self) -> bytes:
        return self.memory.nonce

    @property
    def in_place(self) -> bool:
        return True

    @property
    def longest(self) -> int:
        return self._num_blocks

    def read(self, first: int, count: int = 1) -> Bytes:
        return self.span(first, count)

    def write(self, first: int, count: int = 1) -> AbstractContextManager[Bytes]:
        return nullcontext(self.span(first, count))

    def digests(self, block_ids: Sequence[int]) -> Sums:
        return digest_blocks(self._all, block_ids, self._block_nbytes)


def as_pool(memory: BlockMemory | Pool) -> Pool:
    """A pool of whatever kind as the transports use it."""
    return Spans(memory) if hasattr(memory, "view") else memory  # type: ignore[arg-type]


class MappedPool:
    """Another process' pool, mapped for reading.

    Unmapped when the last reference to it and to its spans goes; nothing else keeps it.
    """

    def __init__(self, path: str, block_nbytes: int, nonce: bytes) -> None:
        """Raises PoolError if `path` names no pool of such blocks with this nonce."""
        descriptor = _open_pool(path)
        try:
            size = _checked_size(descriptor, path, block_nbytes)
            self.num_blocks = (size - NONCE_BYTES) // block_nbytes
            self.block_nbytes = block_nbytes
            self._all: Bytes = np.frombuffer(
                mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8
            )
        finally:
            os.close(descriptor)
        if len(nonce) != NONCE_BYTES or self._all[-NONCE_BYTES:].tobytes() != nonce:
            raise PoolError(f"{path} is not the pool that was meant: its nonce differs.")

    @property
    def all(self) -> Bytes:
        """All blocks, back to back, read-only."""
        return self._all[:-NONCE_BYTES]

    def span(self, first: int, count: int = 1) -> Bytes:
        """Blocks first .. first + count - 1, read-only. Raises PoolError outside the pool."""
        if first < 0 or count < 1 or first + count > self.num_blocks:
            raise PoolError(
                f"Blocks {first}..{first + count - 1} lie outside a pool of {self.num_blocks}."
            )
        start = first * self.block_nbytes
        return self._all[start : start + count * self.block_nbytes]


def _open_pool(path: str) -> int:
    """A descriptor of a regular file behind /proc/<pid>/fd/<n>; the path comes from a peer."""
    if not _POOL_PATH.fullmatch(path):
        raise PoolError(f"A pool's path must look like /proc/<pid>/fd/<n>. Given: {path!r}.")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise PoolError(f"{path} cannot be opened: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PoolError(f"{path} is not a memory file.")
    return descriptor


def _checked_size(descriptor: int, path: str, block_nbytes: int) -> int:
    """The file's size, once it is known to be a memfd that may hold such blocks."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)  # only files in memory have seals
    except OSError:
        raise PoolError(f"{path} is not a memory file.") from None
    size = os.fstat(descriptor).st_size
    if block_nbytes < 1 or size <= NONCE_BYTES or (size - NONCE_BYTES) % block_nbytes:
        raise PoolError(
            f"{path} has {size} bytes, which is no whole number of blocks of {block_nbytes} bytes "
            f"and a nonce of {NONCE_BYTES}."
        )
    return size


def runs(block_ids: Iterable[int], longest: int) -> Iterator[tuple[int, int]]:
    """Merge adjacent numbers: (first, count) pairs that spell out `block_ids` in order.

    No run is longer than `longest` (at least 1), so that what is copied at once stays in a cache.
    """
    first, count = -1, 0
    for block_id in block_ids:
        if count and count < longest and block_id == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = block_id, 1
    if count:
        yield first, count


def ascending(numbers: Sequence[int]) -> bool:
    """Whether each is greater than the one before it."""
    return all(map(operator.lt, numbers, itertools.islice(numbers, 1, None)))


def host_id() -> str:
    """Equal for two processes exactly when one can open the other's /proc/<pid>/fd/<n>:
    same boot of the same kernel, same process-id namespace, same user."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"
