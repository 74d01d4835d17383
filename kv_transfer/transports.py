"""The transports: how the wanted blocks of an authenticated fetch get into the target blocks.

Each has two halves. The source's half answers `Fetch` (what the header says, what follows it); the
sink's half fills the targets. Checksums, retries, leases and tickets are the same for all and lie
outside. A further transport is one more class of each kind in the two tables below.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec
import torch

from pdserve.kernels.digest import Bytes, Sums, copy_blocks, digest_blocks
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import (
    BlockMemory,
    MappedPool,
    Numbers,
    Pool,
    PoolError,
    host_id,
    runs,
)
from pdserve.kv_transfer.parcels import Packing, blocks_in, blocks_of, stream_of
from pdserve.kv_transfer.slices import Sliceable
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.ticket import Place
from pdserve.protocol.transfer import Fetch, FetchHeader

CHUNK_BYTES = 512 * 2**10
"""Received, then summed, at once: small enough to be summed from the cache, large enough that the
calls do not count and the interpreter lock is seldom touched."""
COPIED_BYTES = 16 * 2**20
"""Copied out of shared memory by one call, a few milliseconds: nothing can stop it meanwhile."""
STREAMED_BYTES = 4 * 2**20
"""A piece that large goes past the caches: it would only drive out what the engine has in them."""

PIECES = (4 * 2**20, 64 * 2**20)
"""Bytes of the first and of the largest piece that is asked for at once, each four times the one
before it: the first arrives soon, the source sums one while the sink receives another (if it has
not summed them all since the offer), and there are few exchanges, each of which may cost the sink
its core for a while."""
Wait = Callable[[], float]
"""Gives the deadline (time.monotonic seconds) of the next wait; raises to stop the transfer."""
Arriving: TypeAlias = Generator[Sums, None, None]
"""Blocks as they arrive: their checksums, a few at a time. To be closed by whoever stops early: it
may have more on the way into the targets."""


class TransportUnfit(PdserveError):
    """This transport does not work between these two processes; another one may."""


class TransportSettingError(PdserveError, ValueError):
    """A transport was asked for that does not exist or that this worker cannot offer."""


class SourceHalf(Sliceable, Protocol):
    """Stateless but for the pool, so that any number of threads may use it at once. One whose
    checksums are not the pool's, which its other half knows, has a name for them, `sums_kind`, and
    a method `digests(block_ids)` that gives those of many blocks at once or raises TransportUnfit.
    For one that is `seldom` taken nothing is computed ahead. One whose other half has `copied` says
    `where() -> (path, nonce)` its pool is."""

    def objection(self, fetch: Fetch) -> str:
        """Why this reader cannot be served over this transport; "" if it can."""

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        """The header with what this transport adds to it."""

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        """What follows the header on the line."""


class Receiver(Protocol):
    """Takes what follows a header."""

    borrows: bool
    """Whether the copy is made from memory that the source could take back meanwhile: then it
    counts only if the source confirms the lease afterwards. Such a one may have `pieces` of its own
    in place of PIECES."""

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        """Fill the target blocks in order; yields, after every few, the checksums of the next ones
        that are complete, as they lie in the pool. Raises TransportUnfit, OSError or
        ProtocolError."""


class SinkHalf(Receiver, Sliceable, Protocol):
    """Shared by the sink's threads. One that has a method `detail(source, epoch) -> str` is asked
    for `Fetch.detail`, one that has `reaches(source) -> bool` whether to be tried at all, and one
    that has `copied(line, place, blocks, targets, wait)` copies whole blocks as `receive` does, but
    out of the ticket's place and without a header, or nothing if it does not know that yet."""


class ParcelSource(Protocol):
    """What a source's half has besides if parcels can travel over it (`parcels.py`)."""

    def describe_parcels(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        """As `describe`, of all the ticket's blocks."""

    def send_parcels(self, line: Line, parcels: Bytes, wait: Wait) -> None:
        """As `send`."""


class ParcelSink(Protocol):
    """What a sink's half has besides if parcels can travel over it."""

    def unpacking(self, job: Unpacking) -> Receiver:
        """Receives the parcels of one fetch."""


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Out of parcels of a source with the layout `theirs` into the own pool."""

    pool: Pool
    own: Packing
    theirs: Packing
    numbers: Mapping[int, int]
    """Target block → number of its parcel."""

    @property
    def nbytes(self) -> int:
        """Of one parcel."""
        return self.theirs.nbytes(self.theirs.fingerprint.dtype)

    def put(self, parcels: torch.Tensor, targets: Sequence[int]) -> Sums:
        """Put parcels [n, nbytes] uint8 into their targets; returns their checksums."""
        flat = parcels.view(-1).numpy()
        with stream_of(self.pool):
            dtype = self.theirs.fingerprint.dtype
            self.own.unpack(parcels, dtype, blocks_of(self.pool), targets)
        return digest_blocks(flat, range(len(targets)), self.nbytes)

    def chunks(self, targets: Sequence[int]) -> Iterator[Sequence[int]]:
        chunk = max(1, CHUNK_BYTES // self.nbytes)
        for start in range(0, len(targets), chunk):
            yield targets[start : start + chunk]


class TcpSource:
    """Raw blocks on the line itself, straight from the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def sliced(self, slices: int) -> TcpSource:
        return TcpSource(self._pool.sliced(slices))

    def objection(self, fetch: Fetch) -> str:
        return ""

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return header

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        pool = self._pool
        if pool.in_place:
            spans = [pool.read(first, count) for first, count in runs(block_ids, pool.longest)]
            line.send_buffers(spans, wait)
            return
        for first, count in runs(block_ids, pool.longest):
            line.send_buffers([pool.read(first, count)], wait)

    def describe_parcels(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return header

    def send_parcels(self, line: Line, parcels: Bytes, wait: Wait) -> None:
        line.send_buffers([parcels], wait)


class TcpSink:
    borrows = False

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def sliced(self, slices: int) -> TcpSink:
        return TcpSink(self._pool.sliced(slices))

    def unpacking(self, job: Unpacking) -> Receiver:
        return TcpParcels(job)

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        for first, count in runs(targets, _chunk(self._pool, CHUNK_BYTES)):
            with self._pool.write(first, count) as part:
                line.receive_into(part.data, wait)
                sums = digest_blocks(part, range(count), self._pool.block_nbytes)
            yield sums


class TcpParcels:
    """Raw parcels on the line itself."""

    borrows = False

    def __init__(self, job: Unpacking) -> None:
        self._job = job

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        for chunk in self._job.chunks(targets):
            parcels = torch.empty((len(chunk), self._job.nbytes), dtype=torch.uint8)
            line.receive_into(parcels.view(-1).numpy().data, wait)
            yield self._job.put(parcels, chunk)


class ShmSource:
    """Says where the blocks lie; the reader copies them itself."""

    def __init__(self, pool: Pool) -> None:
        self._path = pool.path
        self._nonce = pool.nonce
        self._host_id = host_id()
        MappedPool(self._path, pool.block_nbytes, self._nonce)  # as a reader will: fail early

    def sliced(self, slices: int) -> ShmSource:
        """Where its pool lies; which blocks are slices, the fetch has said."""
        return self

    def objection(self, fetch: Fetch) -> str:
        if fetch.host_id != self._host_id:
            return "Shared memory needs both workers on one host, under one user."
        return ""

    def where(self) -> tuple[str, bytes]:
        """Path and nonce of the pool, for readers who need not ask."""
        return self._path, self._nonce

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return msgspec.structs.replace(
            header,
            pool_path=self._path,
            pool_blocks=tuple(block_ids),
            pool_nonce=self._nonce,
        )

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        """Nothing follows the header."""

    def describe_parcels(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return self.describe(header, block_ids)

    def send_parcels(self, line: Line, parcels: Bytes, wait: Wait) -> None:
        """Nothing follows the header: the reader makes the same parcels itself."""


class ShmSink:
    """Maps each source's pool once; a mapping lives as long as a line to that source."""

    borrows = True
    pieces = (COPIED_BYTES, 4 * COPIED_BYTES)

    def __init__(self, pool: Pool, copied_bytes: int = COPIED_BYTES) -> None:
        self._pool, self._copied_bytes = pool, copied_bytes
        self._lock = threading.Lock()
        self._mapped: weakref.WeakValueDictionary[tuple[str, bytes], MappedPool] = (
            weakref.WeakValueDictionary()
        )

    def sliced(self, slices: int) -> ShmSink:
        other = copy.copy(self)  # with the same mappings
        other._pool = self._pool.sliced(slices)
        return other

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        if len(header.pool_blocks) != len(targets):
            raise TransportUnfit("The source named another number of blocks than were wanted.")
        try:
            theirs = self._map(line, header.pool_path, header.pool_nonce, header.block_nbytes)
            yield from self._copy(theirs, header.pool_blocks, targets, wait)
        except (PoolError, IndexError) as error:
            raise TransportUnfit(str(error)) from None

    def copied(
        self, line: Line, place: Place, blocks: Numbers, targets: Numbers, wait: Wait
    ) -> Arriving:
        try:
            theirs = self._map(line, place.path, place.nonce, self._pool.block_nbytes)
            yield from self._copy(theirs, blocks, targets, wait)
        except (PoolError, IndexError) as error:
            raise TransportUnfit(str(error)) from None

    def unpacking(self, job: Unpacking) -> Receiver:
        return ShmParcels(job, self._map)

    def _copy(self, theirs: MappedPool, blocks: Numbers, targets: Numbers, wait: Wait) -> Arriving:
        pool, size = self._pool, self._pool.block_nbytes
        if pool.in_place:
            mine, chunk = pool.read(0, pool.num_blocks), _chunk(pool, self._copied_bytes)
            streamed = len(targets) * size >= STREAMED_BYTES
            for start in range(0, len(targets), chunk):
                wait()
                here, there = targets[start : start + chunk], blocks[start : start + chunk]
                yield copy_blocks(theirs.all, there, mine, here, size, streamed=streamed)
            return
        complete = 0
        for first, count in runs(targets, pool.longest):
            wait()
            with pool.write(first, count) as part:
                there = blocks[complete : complete + count]
                sums = copy_blocks(theirs.all, there, part, range(count), size)
            complete += count
            yield sums

    def _map(self, line: Line, path: str, nonce: bytes, block_nbytes: int) -> MappedPool:
        key = (path, nonce)
        with self._lock:
            pool = self._mapped.get(key)
            if pool is None:
                pool = self._mapped[key] = MappedPool(path, block_nbytes, nonce)
        line.keeps["pool"] = pool
        return pool


class ShmParcels:
    """Makes the parcels out of the source's pool, as the source did to sum them."""

    borrows = True

    def __init__(
        self, job: Unpacking, map_pool: Callable[[Line, str, bytes, int], MappedPool]
    ) -> None:
        self._job, self._map = job, map_pool

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        job = self._job
        try:
            size = job.theirs.block_nbytes
            pool = blocks_in(self._map(line, header.pool_path, header.pool_nonce, size).all, size)
            for chunk in job.chunks(targets):
                wait()
                wanted = [job.numbers[target] for target in chunk]
                yield job.put(job.theirs.pack(pool, header.pool_blocks, wanted), chunk)
        except (PoolError, IndexError) as error:
            raise TransportUnfit(str(error)) from None


def _chunk(pool: Pool, nbytes: int) -> int:
    """Blocks to receive at once."""
    return min(pool.longest, max(1, nbytes // pool.block_nbytes))


SOURCE_HALVES: dict[str, Callable[[Pool], SourceHalf]] = {"shm": ShmSource, "tcp": TcpSource}
SINK_HALVES: dict[str, Callable[[Pool], SinkHalf]] = {"shm": ShmSink, "tcp": TcpSink}
"""Best first: "auto" tries them in this order."""


def offered_transports(
    memory: BlockMemory | Pool, transport: str, halves: Iterable[str] = tuple(SOURCE_HALVES)
) -> tuple[str, ...]:
    """What a source with this memory offers, best first, for the setting `transport`; `halves` are
    the transports that it has.

    Raises TransportSettingError if the setting is unknown or the memory cannot do what it asks for.
    """
    known = tuple(halves)
    if transport == "auto":
        return tuple(name for name in known if name != "shm" or memory.path)
    if transport not in known:
        names = ", ".join(["auto", *known])
        raise TransportSettingError(f"The transport must be one of {names}. Given: {transport!r}.")
    if transport == "shm" and not memory.path:
        raise TransportSettingError(
            "The transport shm needs a KV pool in shared memory; choose tcp or auto."
        )
    return (transport,)
