"""The source: the engine's exporter and the server that others fetch from.

Threads: one accepts, one lets leases expire, one serves each connection, and one of low priority
computes the checksums of what was just offered, so that a reader rarely has to wait for them. The
engine thread only takes the outbox's lock for a moment.

    sink                                   source
      │ ── Fetch(ticket, wanted, "tcp") ───► │  outbox.begin: epoch, layout, lease
      │ ◄── FetchHeader(checksums) ───────── │
      │ ◄── raw blocks ───────────────────── │  straight from the pool
      │           ... further pieces ...     │  outbox.end
      │ ── Release(ticket, outcome) ───────► │  blocks go back to the engine
      │ ◄── Released(valid) ──────────────── │
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pdserve.kernels.digest import Sums, digest_blocks
from pdserve.kv_transfer.ahead import Ahead, Summing, summing
from pdserve.kv_transfer.held import Read, Refusal
from pdserve.kv_transfer.ledger import Ledger
from pdserve.kv_transfer.line import (
    REQUEST_LIMIT,
    Complaints,
    Line,
    LineClosed,
    answer_handshake,
)
from pdserve.kv_transfer.memory import (
    BlockMemory,
    Pool,
    as_pool,
    host_id,
)
from pdserve.kv_transfer.outbox import Outbox, OutboxCounters
from pdserve.kv_transfer.parcels import Packing, blocks_of, stream_of
from pdserve.kv_transfer.parcels import objection as parcels_objection
from pdserve.kv_transfer.slices import Cuts
from pdserve.kv_transfer.transports import (
    SOURCE_HALVES,
    SourceHalf,
    TransportUnfit,
)
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint, LeaseMark
from pdserve.protocol.transfer import (
    WATCH_S,
    Fetch,
    FetchHeader,
    Grown,
    Joining,
    Parcels,
    Refused,
    Release,
    Released,
    Renew,
    ToSource,
    Watch,
)
from pdserve.protocol.wire import MessageDecoder

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0

_TO_SOURCE: MessageDecoder[Any] = MessageDecoder(ToSource)


class _Stopped(ConnectionError):
    """The ticket was withdrawn while its blocks were being sent."""


@dataclass(frozen=True, slots=True)
class SourceCounters:
    """A moment's view."""

    outbox: OutboxCounters
    bytes_out: int
    """KV bytes sent or shown to readers since the start."""
    bytes_early: int
    """Those of them whose prompt was still being computed."""
    connections: int
    complaints: int
    """Connections ended for a fault of the peer: strangers, malformed or oversized frames."""


class TransferSource:
    """Offers blocks of `memory` and serves them until `close`. Satisfies the engine's Exporter.

    `on_returned(ticket, ending)` is called exactly once per ticket, from any thread, when its
    blocks are the pool's again; `ending` is one of `held.Ending`. `transports` are offered best
    first (see `transports.offered_transports`). `host` is what tickets name and, unless `bind` says
    otherwise, where the server listens; `port` 0 takes any free one. `halves` are the transports'
    implementations; blocks of growing tickets have `slices` slices; `clock` counts the leases'
    seconds.
    """

    def __init__(
        self,
        memory: BlockMemory | Pool,
        fingerprint: LayoutFingerprint,
        *,
        worker_id: str,
        epoch: int,
        host: str,
        secret: str,
        transports: tuple[str, ...],
        on_returned: Callable[[KVTicket, str], None],
        lease_s: float = 30.0,
        port: int = 0,
        bind: str = "",
        max_connections: int = 1024,
        idle_s: float = 300.0,
        stall_s: float = 5.0,
        halves: Mapping[str, Callable[[Pool], SourceHalf]] | None = None,
        slices: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError for an unknown transport or slices that a block does not have,
        PoolError if the memory cannot be shared, OSError if the port is taken."""
        halves = SOURCE_HALVES if halves is None else halves
        if not transports or set(transports) - set(halves):
            raise ValueError(
                f"Transports are one or more of {', '.join(halves)}. Given: {transports}."
            )
        self._pool = as_pool(memory)
        self._cuts = Cuts(self._pool, {name: halves[name](self._pool) for name in transports})
        self._slices = slices
        self._host_id = host_id()
        self._ahead = Ahead(self._cuts.of(1).halves, self._pool, self._host_id)
        if not self._cuts.can(slices):
            raise ValueError(
                f"A block of {self._pool.block_nbytes} bytes has no {slices} equal slices."
            )
        self._worker_id, self._epoch, self._secret = worker_id, epoch, secret
        self._fingerprint = fingerprint
        self._lease_s, self._idle_s, self._stall_s = lease_s, idle_s, stall_s
        self._max_connections = max_connections
        self._listener = _listen(bind or host, port)
        self.port = int(self._listener.getsockname()[1])
        self._ledger = Ledger(self._pool.num_blocks, fingerprint, self._ahead.kind)
        self.outbox = Outbox(
            worker_id=worker_id,
            epoch=epoch,
            host=host,
            port=self.port,
            transports=transports,
            fingerprint=fingerprint,
            lease_s=lease_s,
            on_returned=on_returned,
            slices=slices,
            clock=clock,
            ledger=self._ledger,
        )
        self._clock = clock
        self._complain = Complaints(log)
        self._lock = threading.Lock()
        self._lines: dict[Line, threading.Thread] = {}
        self._bytes_out = self._bytes_early = 0
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._accept, name="kv-source-accept", daemon=True),
            threading.Thread(target=self._expire, name="kv-source-leases", daemon=True),
            threading.Thread(
                target=self._ahead.run, args=(self.outbox,), name="kv-source-sums", daemon=True
            ),
        ]
        self._advances: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """What a device has still to compute before it can be said; None: the end."""
        if not self._pool.in_place:
            self._threads.append(
                threading.Thread(target=self._advance, name="kv-source-layers", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def offer(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        block_hashes: Sequence[bytes],
    ) -> KVTicket:
        """See `Outbox.offer`. Raises ValueError also for blocks outside the pool."""
        self._check(block_ids)
        place = self._ahead.place(block_ids)
        ticket = self.outbox.offer(request_id, block_ids, num_tokens, block_hashes, place)
        self._ahead.soon(ticket.ticket_id)
        return ticket

    def open(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        *,
        sliced: bool = False,
    ) -> KVTicket:
        """See `Outbox.open`."""
        return self.outbox.open(request_id, num_tokens, block_hashes, sliced=sliced)

    def extend(self, request_id: str, block_ids: Sequence[int]) -> None:
        """See `Outbox.extend`. Raises ValueError also for blocks outside the pool."""
        self._check(block_ids)
        self._ahead.soon(self.outbox.extend(request_id, block_ids))

    @property
    def slices(self) -> int:
        """Of a block of a growing ticket."""
        return self._slices

    def advance(
        self,
        ticket_id: str,
        block_ids: Sequence[int],
        slices: int,
        computed: Callable[[], None] | None = None,
    ) -> None:
        """See `Outbox.advance`; once `computed`, if it is given, has returned, which a thread of
        its own waits for. Raises ValueError also for blocks outside the pool."""
        self._check(block_ids)
        if computed is None:
            self.outbox.advance(ticket_id, block_ids, slices)
            return

        def later() -> None:
            computed()
            self.outbox.advance(ticket_id, block_ids, slices)

        self._advances.put(later)

    def seal(self, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        """See `Outbox.seal`. Raises ValueError also for blocks outside the pool."""
        self._check(block_ids)
        ticket = self.outbox.seal(request_id, block_ids)
        self._ahead.soon(ticket.ticket_id)
        return ticket

    def cut(self, request_id: str) -> bool:
        """See `Outbox.cut`."""
        return self.outbox.cut(request_id)

    def _check(self, block_ids: Sequence[int]) -> None:
        if any(not 0 <= block_id < self._pool.num_blocks for block_id in block_ids):
            raise ValueError(f"A block lies outside the pool of {self._pool.num_blocks} blocks.")

    def withdraw(self, request_id: str) -> None:
        """End the request's ticket, if there is one: at once, or when its last reader has stopped,
        within a fraction of a second (line.STOP_CHECK_S)."""
        self.outbox.withdraw(request_id)

    def begin_epoch(self, epoch: int) -> None:
        """Become another incarnation: what was offered so far cannot be fetched any more."""
        self._epoch = epoch
        self.outbox.begin_epoch(epoch)

    def counters(self) -> SourceCounters:
        with self._lock:
            connections, sent, early = len(self._lines), self._bytes_out, self._bytes_early
        return SourceCounters(
            self.outbox.counters(), sent, early, connections, self._complain.count
        )

    def close(self) -> None:
        """Stop serving and return all blocks. Idempotent; takes at most CLOSE_TIMEOUT_S."""
        self._closing.set()
        self._ahead.close()
        self._advances.put(None)
        self.outbox.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            lines = dict(self._lines)
        for line in lines:
            line.interrupt()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in [*self._threads, *lines.values()]:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _expire(self) -> None:
        # While nothing is held a whole lease may be slept: no ticket minted meanwhile ends sooner.
        while not self._closing.is_set():
            following = self.outbox.expire()
            left = self._lease_s if following is None else following - self._clock()
            self._closing.wait(max(0.0, left))

    def _advance(self) -> None:
        while (later := self._advances.get()) is not None:
            try:
                later()
            except Exception:  # a device's: the engine finds out, too
                log.exception("Some layers of a prompt were not offered early.")

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._closing.wait(0.1):  # out of descriptors, or the peer left already
                    log.warning("A transfer connection could not be accepted: %s.", error)
                continue
            try:
                self._admit(sock, str(address[0]))
            except (OSError, RuntimeError) as error:
                sock.close()
                self._complain(f"A transfer connection from {address[0]} was refused: {error}")

    def _admit(self, sock: socket.socket, host: str) -> None:
        line = Line(sock)
        with self._lock:
            if len(self._lines) >= self._max_connections or self._closing.is_set():
                raise ConnectionRefusedError(
                    f"{len(self._lines)} are open already and {self._max_connections} are allowed."
                )
            thread = threading.Thread(
                target=self._serve, args=(line, host), name="kv-source-line", daemon=True
            )
            thread.start()
            self._lines[line] = thread

    def _serve(self, line: Line, host: str) -> None:
        try:
            answer_handshake(
                line, secret=self._secret, worker_id=self._worker_id, epoch=self._epoch
            )
            while not self._closing.is_set():
                idle_until = time.monotonic() + self._idle_s
                message = (
                    line.kept.popleft()
                    if line.kept
                    else line.receive(_TO_SOURCE, idle_until, REQUEST_LIMIT, frame_s=self._stall_s)
                )
                self._answer(line, message)
        except LineClosed:
            pass
        except ProtocolError as error:
            self._complain(f"A transfer connection from {line.peer or host} was ended: {error}")
        except OSError as error:
            log.debug("The transfer connection from %s ended: %s", line.peer or host, error)
        except Exception:
            log.exception("Serving %s failed.", line.peer or host)
        finally:
            line.close()
            with self._lock:
                self._lines.pop(line, None)

    def _answer(self, line: Line, message: Fetch | Watch | Renew | Release | Joining) -> None:
        if isinstance(message, Joining):
            raise ProtocolError("The peer joins a session that nobody has offered it.")
        if isinstance(message, Fetch):
            self._send(line, message)
            return
        if isinstance(message, Watch):
            self._tell(line, message)
            return
        if isinstance(message, Renew):
            valid = self.outbox.renew(message.ticket_id, message.epoch)
        else:
            valid = self.outbox.release(
                message.ticket_id, message.epoch, message.outcome, line.peer
            )
            if valid:
                with self._lock:
                    self._bytes_out += max(0, message.nbytes)
        self._say(line, Released(ticket_id=message.ticket_id, valid=valid))

    def _tell(self, line: Line, watch: Watch) -> None:
        """How far a growing ticket is, once there is news; the line's thread waits for it."""
        try:
            ready, sealed = self.outbox.watch(watch.ticket_id, watch.epoch, watch.have, WATCH_S)
        except Refusal as refusal:
            self._say(line, Refused(ticket_id=watch.ticket_id, reason=str(refusal)))
        else:
            self._say(line, Grown(ticket_id=watch.ticket_id, ready=ready, sealed=sealed))

    def _send(self, line: Line, fetch: Fetch) -> None:
        if fetch.slices not in (1, self._slices):
            self._refuse(line, fetch, f"Blocks have {self._slices} slices, not {fetch.slices}.")
            return
        half = self._cuts.of(fetch.slices).halves.get(fetch.transport)
        objection = (
            half.objection(fetch)
            if half
            else f"{self._worker_id} does not offer the transport {fetch.transport!r}."
        )
        if not objection and fetch.parcels is not None and not hasattr(half, "send_parcels"):
            objection = f"Parcels do not travel over {fetch.transport}."
        if half is None or objection:
            self._refuse(line, fetch, objection, retry_other_transport=True)
            return
        if fetch.parcels is not None:
            objection = parcels_objection(self._fingerprint, fetch.parcels, len(fetch.wanted))
        if objection:
            self._refuse(line, fetch, objection)
            return
        try:
            read = self.outbox.begin(fetch)
        except Refusal as refusal:
            self._refuse(line, fetch, str(refusal))
            return
        try:
            if fetch.parcels is None:
                nbytes = self._send_blocks(line, fetch, half, read)
            else:
                nbytes = self._send_parcels(line, fetch, half, read, fetch.parcels)
        finally:
            self.outbox.end(read)
        with self._lock:
            self._bytes_out += nbytes
            self._bytes_early += nbytes if read.early else 0

    def _send_blocks(self, line: Line, fetch: Fetch, half: SourceHalf, read: Read) -> int:
        """Returns the bytes that travelled."""
        blocks, pool = read.block_ids, self._cuts.of(fetch.slices).pool
        how = summing(half, pool)
        try:
            sums = read.checksums(how.kind, lambda blocks: self._checksums(read, how, blocks))
            header = self._header(fetch, pool.block_nbytes, sums, read.held.mark)
            header = half.describe(header, blocks)
        except TransportUnfit as error:
            self._refuse(line, fetch, str(error), retry_other_transport=True)
            return 0
        self._say(line, header)
        half.send(line, fetch, blocks, lambda: self._patience(read))
        return len(blocks) * pool.block_nbytes

    def _send_parcels(self, line: Line, fetch: Fetch, half: Any, read: Read, asked: Parcels) -> int:
        """The same for parcels; `half` is a ParcelSource too."""
        self._patience(read)
        packing, blocks = Packing(self._fingerprint, asked), read.held.block_ids
        with stream_of(self._pool):
            packed = packing.pack(blocks_of(self._pool), blocks, fetch.wanted).cpu()
        data, nbytes = packed.view(-1).numpy(), int(packed.shape[1])
        sums = digest_blocks(data, range(len(fetch.wanted)), nbytes)
        header = self._header(fetch, nbytes, tuple(sums.tolist()), read.held.mark)
        self._say(line, half.describe_parcels(header, blocks))
        half.send_parcels(line, data, lambda: self._patience(read))
        return len(data)

    def _header(
        self, fetch: Fetch, nbytes: int, checksums: tuple[int, ...], mark: LeaseMark | None
    ) -> FetchHeader:
        return FetchHeader(
            ticket_id=fetch.ticket_id,
            epoch=fetch.epoch,
            num_blocks=len(fetch.wanted),
            block_nbytes=nbytes,
            checksums=checksums,
            mark=mark if fetch.host_id == self._host_id else None,
        )

    def _patience(self, read: Read) -> float:
        """The deadline of a reader's next step; raises _Stopped if nobody wants it any more."""
        if read.stopped:
            raise _Stopped("The ticket was withdrawn.")
        return time.monotonic() + self._stall_s

    def _checksums(self, read: Read, how: Summing, blocks: Sequence[int]) -> Sums:
        sums = [np.empty(0, np.uint64)]
        for start in range(0, len(blocks), how.at_once):
            self._patience(read)
            sums.append(how.compute(blocks[start : start + how.at_once]))
        return np.concatenate(sums)

    def _refuse(
        self, line: Line, fetch: Fetch, reason: str, retry_other_transport: bool = False
    ) -> None:
        log.info("A fetch of %s by %s was refused: %s", fetch.request_id, line.peer, reason)
        self._say(
            line,
            Refused(
                ticket_id=fetch.ticket_id,
                reason=reason,
                retry_other_transport=retry_other_transport,
            ),
        )

    def _say(self, line: Line, message: FetchHeader | Refused | Grown | Released) -> None:
        line.send(message, time.monotonic() + self._stall_s)


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=128)
