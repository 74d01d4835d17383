"""CUDA IPC: blocks from one GPU's pool into another's on the same host, device to device.

    sink                                      source
      │ ── Fetch("ipc", detail = bus id) ───► │  has summed the blocks on its GPU, or does it now
      │ ◄── FetchHeader(checksums, handle) ── │
      │ maps the pool once; copies and sums   │  (sees nothing of it, as with shared memory)
      │ in one kernel, compares               │

The sink reads the source's pool itself, so its copy counts only if the source confirms the lease
afterwards (`borrows`). Checksums are those of `pdserve.kernels.sums`, computed where blocks lie:
xxh3 would carry every byte to the host. What is summed is what the kernel has stored.

A mapping belongs to the lines to one incarnation of a source (their `keeps`): it is closed when the
last of them is, which happens when another epoch answers, the source dies, or nobody has used them
for a while. Until then the driver keeps the source's memory, even if its process is gone.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import msgspec
import numpy as np
import torch
import torch.utils.dlpack

from pdserve.kernels import copy_blocks_summed
from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.device_sums import KIND, WORD, DeviceSums, Launched, has_words
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import NONCE_BYTES, Numbers, Pool, host_id
from pdserve.kv_transfer.streams import CudaStreams, Streams, opened, with_first
from pdserve.kv_transfer.transports import (
    Arriving,
    SinkHalf,
    SourceHalf,
    TransportUnfit,
    Wait,
)
from pdserve.protocol.ticket import Place
from pdserve.protocol.transfer import DevicePool, Fetch, FetchHeader

log = logging.getLogger(__name__)

HANDLE_BYTES = 64
"""Of CUDA's name for an allocation; its functions read that many."""
CHUNK_BYTES = 2**30
"""Asked for at once and copied by one launch: it cannot be called back, and between two GPUs takes
some 20 ms at most."""
LAUNCHED_AHEAD = 1
"""Chunks launched while the one before them is copied, of those that nobody was asked for: the
device need not wait for the host."""
LOOK_S = 0.05
"""Who waits for a mapping that another thread opens looks this often whether it is still wanted."""


class Runtime(Protocol):
    """What is needed of CUDA's runtime. Whatever fails raises an exception of its own kind."""

    streams: Streams

    def bus_id(self) -> str:
        """Of the own device, as other processes know it."""

    def reaches(self, bus_id: str) -> bool:
        """Whether the own device can read that one's memory, which may be its own."""

    def share(self, tensor: torch.Tensor) -> tuple[bytes, int]:
        """(handle of the allocation that the tensor lies in, bytes from its begin)."""

    def open(self, handle: bytes) -> int:
        """Map another process' allocation; its address here."""

    def extent(self, address: int) -> int:
        """Bytes of the allocation that begins there."""

    def close(self, address: int) -> None:
        """Undo `open`."""

    def words(self, address: int, shape: tuple[int, int]) -> torch.Tensor:
        """The memory at an address as int64, without owning it."""


class CudaRuntime:
    """CuPy's, and the driver's for what CuPy leaves out."""

    def __init__(self, device: torch.device) -> None:
        """Raises TransportUnfit if CuPy or a device is missing."""
        if not torch.cuda.is_available():
            raise TransportUnfit("CUDA IPC needs a CUDA device, and this process sees none.")
        try:
            import cupy
        except ImportError as error:
            raise TransportUnfit(f"CUDA IPC needs CuPy (extra `gpu`): {error}.") from None
        self._cupy: Any = cupy
        self._device = torch.device("cuda", device.index or 0)
        self.streams: Streams = CudaStreams(self._device)

    @property
    def _runtime(self) -> Any:
        return self._cupy.cuda.runtime

    def bus_id(self) -> str:
        return str(self._runtime.deviceGetPCIBusId(self._device.index))

    def reaches(self, bus_id: str) -> bool:
        try:
            other = int(self._runtime.deviceGetByPCIBusId(bus_id))
        except Exception:  # hidden from this process
            return False
        own = self._device.index
        return other == own or bool(self._runtime.deviceCanAccessPeer(own, other))

    def share(self, tensor: torch.Tensor) -> tuple[bytes, int]:
        begin, _ = _allocation(tensor.data_ptr())
        with self._cupy.cuda.Device(self._device.index):
            handle = self._runtime.ipcGetMemHandle(begin)
        return bytes(handle), tensor.data_ptr() - begin

    def open(self, handle: bytes) -> int:
        with self._cupy.cuda.Device(self._device.index):
            flags = self._runtime.cudaIpcMemLazyEnablePeerAccess
            return int(self._runtime.ipcOpenMemHandle(handle, flags))

    def extent(self, address: int) -> int:
        with self._cupy.cuda.Device(self._device.index):
            return _allocation(address)[1]

    def close(self, address: int) -> None:
        with self._cupy.cuda.Device(self._device.index):
            self._runtime.ipcCloseMemHandle(address)

    def words(self, address: int, shape: tuple[int, int]) -> torch.Tensor:
        cupy = self._cupy
        nbytes, device = shape[0] * shape[1] * WORD, self._device.index
        memory = cupy.cuda.UnownedMemory(address, nbytes, owner=None, device_id=device)
        array = cupy.ndarray(shape, cupy.int64, cupy.cuda.MemoryPointer(memory, 0))
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(array)
        return tensor


def _allocation(address: int) -> tuple[int, int]:
    """(begin, bytes) of the allocation that an address of the device lies in."""
    begin, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    place = ctypes.c_uint64(address)
    if driver.cuMemGetAddressRange_v2(ctypes.byref(begin), ctypes.byref(size), place):
        raise TransportUnfit("The driver does not know the allocation of the KV pool.")
    return begin.value, size.value


class _End:
    """What both ends have: a pool whose blocks can be summed on the device."""

    def __init__(self, pool: DeviceMemory, runtime: Runtime) -> None:
        """Raises TransportUnfit for blocks that are no whole number of words."""
        if not has_words(pool):
            raise TransportUnfit(
                f"CUDA IPC needs blocks of a multiple of {WORD} bytes, not {pool.block_nbytes}."
            )
        self._pool, self._runtime = pool, runtime
        self._sums = DeviceSums(pool, runtime.streams)

    def sliced(self, slices: int) -> Self | None:
        """With the same mappings; None if slices are no whole number of words."""
        if self._pool.block_nbytes // slices % WORD:
            return None
        other = copy.copy(self)
        _End.__init__(other, self._pool.sliced(slices), self._runtime)
        return other

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """The device's sums. Raises TransportUnfit."""
        return self._sums.digests(block_ids)

    def warm_up(self) -> None:
        """See `DeviceSums.warm_up`."""
        self._sums.warm_up()


class IpcSource(_End):
    """Says where the blocks lie on the device; the reader copies them itself."""

    sums_kind = KIND

    def __init__(self, pool: DeviceMemory, runtime: Runtime) -> None:
        super().__init__(pool, runtime)
        handle, offset = runtime.share(pool.blocks)
        self._shared = DevicePool(
            handle=handle, offset=offset, num_blocks=pool.num_blocks, bus_id=runtime.bus_id()
        )
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._host_id = host_id()

    def sliced(self, slices: int) -> Self | None:
        other = super().sliced(slices)
        if other is not None:
            other._shared = msgspec.structs.replace(
                self._shared, num_blocks=self._shared.num_blocks * slices
            )
        return other

    def objection(self, fetch: Fetch) -> str:
        if fetch.host_id != self._host_id:
            return "CUDA IPC needs both workers on one host, under one user."
        return "" if fetch.detail else "CUDA IPC needs a reader whose KV pool is on a GPU."

    def where(self) -> tuple[str, bytes]:
        """No path, and the name of the pool, for readers who have mapped it before."""
        return "", self._nonce

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return msgspec.structs.replace(
            header,
            pool_blocks=tuple(block_ids),
            pool_nonce=self._nonce,
            pool_device=self._shared,
        )

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        """Nothing follows the header."""


class _Mapping:
    """Another process' pool, open as long as this object lives."""

    def __init__(self, runtime: Runtime, shared: DevicePool, words: int, nonce: bytes) -> None:
        self.nonce = nonce
        address = runtime.open(shared.handle)
        self._closer = weakref.finalize(self, _close, runtime, address)
        end, extent = shared.offset + shared.num_blocks * words * WORD, runtime.extent(address)
        if shared.num_blocks < 1 or end > extent:
            raise TransportUnfit(
                f"The source's KV pool would end at byte {end} of an allocation of {extent}."
            )
        self.words = runtime.words(address + shared.offset, (shared.num_blocks, words))


def _close(runtime: Runtime, address: int) -> None:
    try:
        runtime.close(address)
    except Exception as error:
        log.warning("Closing a mapping of another worker's KV pool failed: %r.", error)


class IpcSink(_End):
    """Maps each source's pool once."""

    borrows = True
    pieces = (CHUNK_BYTES, CHUNK_BYTES)

    def __init__(self, pool: DeviceMemory, runtime: Runtime) -> None:
        super().__init__(pool, runtime)
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[str, int, bytes], _Mapping] = (
            weakref.WeakValueDictionary()
        )

    def detail(self, source: str, epoch: int) -> str:
        """What `Fetch.detail` says to any source."""
        return self._runtime.bus_id()

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        shared, blocks = header.pool_device, header.pool_blocks
        if shared is None or len(blocks) != len(targets):
            raise TransportUnfit("The source did not say where all the wanted blocks lie.")
        yield from self._copied(self._map(line, header, shared, wait), blocks, targets, wait)

    def copied(
        self, line: Line, place: Place, blocks: Numbers, targets: Numbers, wait: Wait
    ) -> Arriving:
        mapping = line.keeps.get("pool")
        if isinstance(mapping, _Mapping) and mapping.nonce == place.nonce:
            yield from self._copied(mapping, blocks, targets, wait)

    def _copied(self, mapping: _Mapping, blocks: Numbers, targets: Numbers, wait: Wait) -> Arriving:
        own = self._sums.words
        pool = mapping.words.view(-1, own.shape[1])
        both = np.array([blocks, targets], np.int64)
        if both.size and not 0 <= both[0].min() <= both[0].max() < len(pool):  # not a header's word
            raise TransportUnfit(f"The source named a block outside its {len(pool)}.")
        chunk = max(1, CHUNK_BYTES // self._pool.block_nbytes)
        ahead: deque[Launched] = deque()
        try:
            for start in range(0, both.shape[1], chunk):
                wait()
                ahead.append(self._copy(pool, both[:, start : start + chunk]))
                if len(ahead) > LAUNCHED_AHEAD:
                    yield ahead[0].wait(wait)
                    ahead.popleft()
            while ahead:
                yield ahead[0].wait(wait)
                ahead.popleft()
        finally:  # what was launched writes into the targets, whoever stopped
            if ahead:
                ahead[-1].settle()

    def _copy(self, pool: torch.Tensor, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> Launched:
        def copies() -> torch.Tensor:
            theirs, mine = self._sums.index(*numbers)
            return copy_blocks_summed(pool, theirs, self._sums.words, mine)

        return self._sums.launch(copies)

    def _map(self, line: Line, header: FetchHeader, shared: DevicePool, wait: Wait) -> _Mapping:
        while not self._lock.acquire(timeout=LOOK_S):
            wait()
        try:
            key = (line.peer, header.epoch, header.pool_nonce)
            mapping = self._mapped.get(key)
            if mapping is None:
                mapping = self._mapped[key] = self._open(shared, header.pool_nonce)
        finally:
            self._lock.release()
        line.keeps["pool"] = mapping
        return mapping

    def _open(self, shared: DevicePool, nonce: bytes) -> _Mapping:
        if len(shared.handle) != HANDLE_BYTES or shared.offset < 0 or shared.offset % WORD:
            raise TransportUnfit("The source named its KV pool in a way that CUDA does not know.")
        try:
            if not self._runtime.reaches(shared.bus_id):
                raise TransportUnfit(
                    f"The GPU {self._runtime.bus_id()} cannot read the memory of {shared.bus_id}."
                )
            return _Mapping(self._runtime, shared, self._sums.words.shape[1], nonce)
        except TransportUnfit:
            raise
        except Exception as error:  # CuPy's kinds
            raise TransportUnfit(f"The source's KV pool cannot be mapped: {error!r}.") from error


def open_ipc(pool: object, transport: str) -> Runtime | None:
    """CUDA IPC for this pool, which nobody may use yet, if it can be had; see `streams.opened`."""
    return opened("ipc", pool, transport, _runtime_for)


def _runtime_for(pool: DeviceMemory) -> Runtime:
    runtime = CudaRuntime(pool.blocks.device)
    try:
        IpcSource(pool, runtime).warm_up()  # as a source will: fail early
    except TransportUnfit:
        raise
    except Exception as error:  # CuPy's kinds
        raise TransportUnfit(f"The KV pool cannot be shared: {error!r}.") from error
    return runtime


def source_halves(
    runtime: Runtime | None, others: Mapping[str, Callable[[Pool], SourceHalf]]
) -> dict[str, Callable[[Pool], SourceHalf]]:
    """`others`, after CUDA IPC if there is a runtime."""
    return with_first("ipc", runtime, IpcSource, others)


def sink_halves(
    runtime: Runtime | None, others: Mapping[str, Callable[[Pool], SinkHalf]]
) -> dict[str, Callable[[Pool], SinkHalf]]:
    """`others`, after CUDA IPC if there is a runtime."""
    return with_first("ipc", runtime, IpcSink, others)
