"""NCCL through CuPy: blocks from one GPU's pool to another's, in a communicator of two.

    sink                                     source
      │ ── Fetch("nccl", detail = version/over) ────► │
      │ ◄── FetchHeader(checksums) ────────────────── │
      │ ◄── Ready(session, blocks per send) ───────── │  holds the pair
      │ ── Joining(session) ────────────────────────► │  only if the session is new: both join now
      │ posts a receive        ◄═══ raw bytes ═══════ │  one send per chunk, out of a staging buffer
      │ scatters, verifies                            │

One communicator per pair of processes and epoch of the source, made on first use; a session is its
unique id. Both ends keep it until something goes wrong, the other end says that it is over, or
nobody has used it for long: then it is aborted, by a helper thread that may get stuck without harm.
A communicator is never repaired. NCCL never touches a pool: a kernel that is stuck for ever writes
into a staging buffer that nobody uses any more.

Every NCCL call that may block is made by one thread of the process, under a deadline; waiting for
completion is polling an event. If that thread does not come back it is given up and replaced, at
most `nccl_owner.LOST_THREADS` times (a communicator that cannot be aborted counts too); then this
process does without NCCL until it is started again. Whatever fails on the sink's side is
TransportUnfit: the pair goes on with the next transport, in the middle of the request, and leaves
NCCL alone for a while.

Why not a process of its own. What it could do better is to be killed: with a kernel that spins
after an abort that hangs (here it keeps at most `nccl_owner.MAX_CTAS` blocks of threads of the GPU
until the worker is restarted), with a CUDA error that spoils its context, with a crash inside NCCL.
What it would cost is paid by every step: two processes share a GPU in time slices unless MPS is set
up, so each transfer would hold up decoding; and it takes a CUDA context of some hundred MiB. A
worker is such a process already: `pdserve up` restarts it, and its requests go on elsewhere. None
of this has been measured.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from pdserve.kernels import gather_blocks, scatter_blocks, sum_blocks
from pdserve.kernels.digest import Sums
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.device_sums import (
    KIND,
    DeviceSums,
    has_words,
    index_of,
    numbers,
    to_host,
)
from pdserve.kv_transfer.line import REQUEST_LIMIT, Line
from pdserve.kv_transfer.memory import (
    HOST_SUMS,
    Pool,
)
from pdserve.kv_transfer.nccl_owner import NcclTrouble, Owner, load_nccl
from pdserve.kv_transfer.streams import CudaStreams, Streams, opened, with_first
from pdserve.kv_transfer.transports import (
    Arriving,
    SinkHalf,
    SourceHalf,
    TransportUnfit,
    Wait,
)
from pdserve.protocol.errors import PdserveError, ProtocolError
from pdserve.protocol.transfer import Fetch, FetchHeader, Joining, Ready, ToReader, ToSource
from pdserve.protocol.wire import MessageDecoder

log = logging.getLogger(__name__)

STAGING_BYTES = 32 * 2**20
"""One send: large enough to fill the link, small enough to be late by little. More if one block is
larger."""
IDLE_S = 600.0
"""A pair that was not used for so long is given up when another one is made."""
SCATTER_S = 5.0
"""A kernel that copies STAGING_BYTES within the device takes no longer than this."""
POLL_S = 0.0001
LOCK_LOOK_S = 0.05
MOST_KEPT = 8
"""Messages that a reader may have sent ahead of its `Joining`."""
SOURCE, SINK = 0, 1
"""Ranks."""

_TO_READER: MessageDecoder[Any] = MessageDecoder(ToReader)
_TO_SOURCE: MessageDecoder[Any] = MessageDecoder(ToSource)


@dataclass(slots=True, eq=False)
class _Pair:
    """A communicator and what it works with."""

    session: bytes
    communicator: Any
    stream: Any
    staging: torch.Tensor
    """[bytes] uint8 on the device."""


@dataclass(slots=True, eq=False)
class _Place:
    """Where a pair is, if there is one. The lock is held during a transfer."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    pair: _Pair | None = None
    over: bytes = b""
    """The session of the last pair that was given up: there is no second time in it."""
    used_at: float = 0.0


class _End:
    """What both ends do: keep pairs, join, wait, give up."""

    def __init__(self, pool: DeviceMemory, owner: Owner, rank: int) -> None:
        self._pool, self._blocks, self._owner, self._rank = pool, pool.blocks, owner, rank
        self._room = max(1, STAGING_BYTES // pool.block_nbytes)
        self._sums = DeviceSums(pool, owner.streams) if has_words(pool) else None
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], _Place] = {}

    def sliced(self, slices: int) -> Self:
        """With the same pairs."""
        other = copy.copy(self)
        other._pool = self._pool.sliced(slices)
        other._blocks, other._room = other._pool.blocks, self._room * slices
        fits = has_words(other._pool)
        other._sums = DeviceSums(other._pool, self._owner.streams) if fits else None
        return other

    @contextlib.contextmanager
    def _held(self, peer: tuple[str, int], wait: Wait) -> Iterator[_Place]:
        """The pair's place, for this thread alone. If anything goes wrong inside, the pair is
        given up."""
        with self._lock:
            place = self._places.setdefault(peer, _Place())
        while not place.lock.acquire(timeout=LOCK_LOOK_S):
            wait()
        try:
            yield place
        except BaseException:
            self._give_up(place)
            raise
        finally:
            place.used_at = time.monotonic()
            place.lock.release()

    def _give_up(self, place: _Place) -> None:
        pair, place.pair = place.pair, None
        if pair is not None:
            place.over = pair.session
            self._owner.abort(pair.communicator)

    def _sweep(self, peer: tuple[str, int]) -> None:
        """Give up pairs that are of no more use, before another one is made for `peer`: those that
        were not used for long, or are of an earlier life of the same worker."""
        before, worker = time.monotonic() - IDLE_S, peer[0].partition("#")[0]
        with self._lock:  # not while giving up, which may take a while
            others = {other: place for other, place in self._places.items() if other != peer}
            earlier = [other for other in others if other[0].partition("#")[0] == worker]
            for other in earlier:
                del self._places[other]
        for other in earlier:
            self._give_up(others.pop(other))
        for place in others.values():
            if place.used_at < before and place.lock.acquire(blocking=False):
                try:
                    self._give_up(place)
                finally:
                    place.lock.release()

    def _join(self, peer: tuple[str, int], session: bytes) -> _Pair:
        """Make the communicator; the other end does the same now."""
        self._sweep(peer)
        owner = self._owner

        def join() -> _Pair:
            stream = owner.streams.new()
            staging = self._blocks.new_empty(self._room * self._blocks.shape[1])
            communicator = owner.nccl.NcclCommunicator(2, session, self._rank)
            try:
                self._greet(communicator, staging, stream)
            except BaseException:
                owner.abort(communicator)
                raise
            return _Pair(session, communicator, stream, staging)

        return owner.call(join, time.monotonic() + owner.init_s)

    def _greet(self, communicator: Any, staging: torch.Tensor, stream: Any) -> None:
        """One byte: the first operation makes the connections, in a call that may wait for the
        other end, and should do so while there is time."""
        owner, other = self._owner, 1 - self._rank
        post = communicator.send if self._rank == SOURCE else communicator.recv
        with owner.streams.on(stream):
            handle = owner.streams.handle(stream)
            post(int(staging.data_ptr()), 1, owner.nccl.NCCL_UINT8, other, handle)

    def _launch(self, pair: _Pair, function: Callable[[int], None], wait: Wait) -> None:
        """Run `function(stream handle)` on the pair's stream, then wait until all of it is done."""
        streams = self._owner.streams
        deadline = wait()

        def launch() -> Any:
            with streams.on(pair.stream):
                function(streams.handle(pair.stream))
            return streams.mark(pair.stream)

        mark = self._owner.call(launch, deadline)
        while not _done(pair, mark):
            wait()
            if time.monotonic() >= deadline:
                raise NcclTrouble("An NCCL transfer did not end in time.")
            time.sleep(POLL_S)

    @property
    def sums_kind(self) -> str:
        """The device's own if the blocks are whole words, which both ends know."""
        return HOST_SUMS if self._sums is None else KIND

    def digests(self, block_ids: Sequence[int]) -> Sums:
        """Of that kind. Raises TransportUnfit."""
        sums = self._pool if self._sums is None else self._sums
        return sums.digests(block_ids)

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        return index_of([blocks], self._blocks.device)[0]

    def _of(self, staging: torch.Tensor, count: int) -> tuple[torch.Tensor, int, int]:
        """(the first `count` blocks of a staging buffer, their address, their bytes)."""
        nbytes = self._blocks.shape[1]
        part = staging[: count * nbytes].view(count, nbytes)
        return part, int(part.data_ptr()), part.numel()

    def close(self) -> None:
        with self._lock:
            places, self._places = list(self._places.values()), {}
        for place in places:
            self._give_up(place)


def _done(pair: _Pair, mark: Any) -> bool:
    """Raises NcclTrouble if the communicator or the device has failed."""
    try:
        if mark.query():
            return True
        pair.communicator.check_async_error()
    except Exception as error:  # NcclError, KeyError for codes that CuPy does not know, CUDA's
        raise NcclTrouble(f"NCCL failed: {error!r}.") from error
    return False


class NcclSource(_End):
    """The source's half."""

    def __init__(self, pool: DeviceMemory, owner: Owner) -> None:
        super().__init__(pool, owner, SOURCE)

    def objection(self, fetch: Fetch) -> str:
        version = fetch.detail.partition("/")[0]
        if version != str(self._owner.version):
            return (
                f"NCCL must be the same version at both ends: {self._owner.version} here, "
                f"{version or 'none'} there."
            )
        return self._owner.problem

    def describe(self, header: FetchHeader, block_ids: Sequence[int]) -> FetchHeader:
        return header

    def send(self, line: Line, fetch: Fetch, block_ids: Sequence[int], wait: Wait) -> None:
        over = fetch.detail.partition("/")[2]
        peer = (line.peer, fetch.epoch)  # of its readers' epochs their names tell
        with self._held(peer, wait) as place:
            if place.pair is not None and place.pair.session.hex() == over:
                self._give_up(place)
            session = self._new_session(wait) if place.pair is None else place.pair.session
            line.send(Ready(session=session, blocks_per_send=self._room), wait())
            if place.pair is None:
                _await_joining(line, session, wait)
                place.pair = self._join(peer, session)
            pair = place.pair
            for start in range(0, len(block_ids), self._room):
                self._send_chunk(pair, block_ids[start : start + self._room], wait)

    def _new_session(self, wait: Wait) -> bytes:
        session: bytes = self._owner.call(self._owner.nccl.get_unique_id, wait())
        return session

    def _send_chunk(self, pair: _Pair, block_ids: Sequence[int], wait: Wait) -> None:
        part, address, nbytes = self._of(pair.staging, len(block_ids))
        kind = self._owner.nccl.NCCL_UINT8

        def send(stream: int) -> None:
            gather_blocks(self._blocks, self._index(block_ids), out=part)
            pair.communicator.send(address, nbytes, kind, SINK, stream)

        self._launch(pair, send, wait)


def _await_joining(line: Line, session: bytes, wait: Wait) -> None:
    """Until the reader says that it joins; what it has asked ahead meanwhile is kept."""
    while len(line.kept) < MOST_KEPT:
        message = line.receive(_TO_SOURCE, wait(), REQUEST_LIMIT)
        if isinstance(message, Joining):
            if message.session != session:
                raise ProtocolError("The reader joins another session.")
            return
        line.kept.append(message)
    raise ProtocolError("The reader asks for ever more and does not join.")


class NcclSink(_End):
    """The sink's half."""

    borrows = False

    def __init__(self, pool: DeviceMemory, owner: Owner) -> None:
        super().__init__(pool, owner, SINK)

    def detail(self, source: str, epoch: int) -> str:
        """What `Fetch.detail` says to this source."""
        with self._lock:
            earlier = [p for p in self._places if p[0] == source and p[1] != epoch]
            gone = [self._places.pop(peer) for peer in earlier]
            place = self._places.get((source, epoch))
        for other in gone:
            self._give_up(other)
        return f"{self._owner.version}/{place.over.hex() if place is not None else ''}"

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Wait
    ) -> Arriving:
        try:
            yield from self._receive(line, (line.peer, header.epoch), targets, wait)
        except (OSError, ProtocolError, PdserveError) as error:
            wait()  # raises if the fetch is over anyway: that is the better reason
            raise TransportUnfit(str(error)) from error

    def _receive(
        self, line: Line, peer: tuple[str, int], targets: Sequence[int], wait: Wait
    ) -> Arriving:
        ready = line.receive(_TO_READER, wait())
        if not isinstance(ready, Ready) or not 1 <= ready.blocks_per_send <= self._room:
            raise ProtocolError("The source did not say how it is going to send.")
        with self._held(peer, wait) as place:
            if place.pair is not None and place.pair.session != ready.session:
                self._give_up(place)
            if place.pair is None and ready.session == place.over:
                raise NcclTrouble("The source named a session that is over.")
            if place.pair is None:
                line.send(Joining(session=ready.session), wait())
                place.pair = self._join(peer, ready.session)
            for start in range(0, len(targets), ready.blocks_per_send):
                chunk = targets[start : start + ready.blocks_per_send]
                yield self._receive_chunk(place.pair, chunk, wait)

    def _receive_chunk(self, pair: _Pair, targets: Sequence[int], wait: Wait) -> Sums:
        """Returns the checksums of what lies in the pool then."""
        part, address, nbytes = self._of(pair.staging, len(targets))
        kind, sums = self._owner.nccl.NCCL_UINT8, list[torch.Tensor]()
        self._launch(
            pair,
            lambda stream: pair.communicator.recv(address, nbytes, kind, SOURCE, stream),
            wait,
        )
        # Not to be left half way: the targets would be somebody else's while it still writes.
        until = time.monotonic() + SCATTER_S

        def scatter(stream: int) -> None:
            index = self._index(targets)
            scatter_blocks(part, self._blocks, index)
            if self._sums is not None:
                sums.append(to_host(sum_blocks(self._sums.words, index)))

        self._launch(pair, scatter, lambda: until)
        return numbers(sums[0]) if sums else self._pool.digests(targets)


def open_nccl(pool: object, transport: str) -> Owner | None:
    """NCCL for this pool, which nobody may use yet, if it can be had; see `streams.opened`."""

    def make(memory: DeviceMemory) -> Owner:
        owner = Owner(load_nccl(), CudaStreams(memory.blocks.device))
        _warm_up(memory, owner.streams)
        return owner

    return opened("nccl", pool, transport, make)


def _warm_up(pool: DeviceMemory, streams: Streams) -> None:
    """Put block 0 where it is, so that no transfer waits for a compiler. Raises TransportUnfit."""
    if has_words(pool):
        DeviceSums(pool, streams).warm_up()
    first = index_of([[0]], pool.blocks.device)[0]
    scatter_blocks(gather_blocks(pool.blocks, first), pool.blocks, first)


def source_halves(
    owner: Owner | None, others: Mapping[str, Callable[[Pool], SourceHalf]]
) -> dict[str, Callable[[Pool], SourceHalf]]:
    """`others`, after NCCL if there is an owner."""
    return with_first("nccl", owner, NcclSource, others)


def sink_halves(
    owner: Owner | None, others: Mapping[str, Callable[[Pool], SinkHalf]]
) -> dict[str, Callable[[Pool], SinkHalf]]:
    """`others`, after NCCL if there is an owner."""
    return with_first("nccl", owner, NcclSink, others)
