"""The sink: the engine's importer, which fetches tickets' blocks into the own pool.

A fetch waits in a queue until one of a few threads takes it. That thread asks for the wanted
blocks in pieces, the next piece before it has received the last, verifies each block, asks once
more (over the next transport, if there is one) for blocks that did not arrive intact, releases the
ticket and reports. One more thread keeps the leases of all fetches alive, waiting ones included,
ends those that time out in the queue and closes connections that nobody needs.

    QUEUED ──► ACTIVE ──► DONE      done(report) is called on entering DONE, exactly once;
       └─────────────────►          the targets belong to the transfer until then
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pdserve.kv_transfer.credits import Credits
from pdserve.kv_transfer.job import Done, Ended, Job
from pdserve.kv_transfer.line import Address, EpochChanged, Line, LinePool
from pdserve.kv_transfer.memory import BlockMemory, Pool, as_pool, host_id
from pdserve.kv_transfer.transports import SINK_HALVES, SinkHalf, TransportUnfit
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import (
    Fetch,
    FetchHeader,
    FetchReport,
    Outcome,
    Refused,
    Release,
    Released,
    Renew,
    ToReader,
)
from pdserve.protocol.wire import MessageDecoder

log = logging.getLogger(__name__)

FIRST_PIECE_BYTES = 4 * 2**20
LARGEST_PIECE_BYTES = 64 * 2**20
"""Blocks are asked for in pieces, each four times the one before it: the first arrives soon, the
source hashes one while the sink receives another (if it has not hashed them all since the offer),
and there are few exchanges, each of which may cost the sink its core for a while."""
ASKED_AHEAD = 2
"""Pieces of one fetch that may be on their way."""
TRIES = 2
"""Times that a block is asked for; a transport that turns out unfit does not count."""
RELEASE_TIMEOUT_S = 1.0
RENEW_TIMEOUT_S = 1.0
UNFIT_S = 60.0
"""A transport that did not work with a source is not tried again for so long."""
ROUTES_KEPT = 32
"""Sources of which the transport is remembered, for people who ask."""
SWEEP_S = 1.0
IDLE_S = 60.0
"""Unused connections are closed after this; well before the source would."""

_TO_READER: MessageDecoder[Any] = MessageDecoder(ToReader)


@dataclass(frozen=True, slots=True)
class SinkCounters:
    """A moment's view."""

    fetching: int
    """Fetches not yet reported."""
    bytes_in: int
    """KV bytes received since the start, those that were thrown away included."""
    fetches: dict[str, int]
    """Reported fetches by outcome: "ok", "failed"."""
    transports: dict[str, int]
    """Reported fetches by the transport that was used last."""
    routes: dict[str, str]
    """Source → the transport that last brought all the blocks of a fetch from it."""
    in_flight: int
    """Bytes asked for and not yet received."""


@dataclass(slots=True, eq=False)
class _Kept:
    """A ticket whose request has no room yet."""

    ticket: KVTicket
    renew_at: float


class TransferSink:
    """Fetches into `memory` until `close`. Satisfies the engine's Importer.

    `transport` is "auto" (the best that both sides have, the next one if it fails) or the name of
    the only one to use. `stall_s`: a peer that says nothing for so long is given up; `limit_s`: a
    fetch that takes so long from its start (not counting the queue) is given up. `halves` are the
    transports' implementations, best first. `in_flight_per_source`, `in_flight`: bytes that may
    have been asked for and not yet received.
    """

    def __init__(
        self,
        memory: BlockMemory | Pool,
        fingerprint: LayoutFingerprint,
        *,
        name: str,
        secret: str,
        transport: str = "auto",
        threads: int = 4,
        stall_s: float = 5.0,
        halves: Mapping[str, Callable[[Pool], SinkHalf]] | None = None,
        limit_s: float = 60.0,
        in_flight_per_source: int = 256 * 2**20,
        in_flight: int = 512 * 2**20,
    ) -> None:
        """Raises ValueError if the transport is unknown or a limit makes no sense."""
        halves = SINK_HALVES if halves is None else halves
        if transport != "auto" and transport not in halves:
            known = ", ".join(["auto", *halves])
            raise ValueError(f"The transport must be one of {known}. Given: {transport!r}.")
        self._pool = as_pool(memory)
        self._fingerprint = fingerprint
        self._halves = {
            key: make(self._pool) for key, make in halves.items() if transport in ("auto", key)
        }
        self._stall_s, self._limit_s = stall_s, limit_s
        self._credits = Credits(in_flight_per_source, in_flight)
        self._host_id = host_id()
        # The name is made unique, so that the source never takes a restarted sink for its old self.
        self._lines = LinePool(secret=secret, name=f"{name}#{secrets.token_hex(4)}")
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._kept: dict[str, _Kept] = {}
        self._unfit: dict[tuple[str, int, str], float] = {}
        """(source, epoch, transport) → when it may be tried again."""
        self._bytes_in = 0
        self._fetches: Counter[str] = Counter()
        self._transports: Counter[str] = Counter()
        self._routes: dict[str, str] = {}
        self._closing = False
        self._release_until = float("inf")
        self._next_look = float("inf")
        """When the keeper looks again by itself."""
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"kv-sink-{index}", daemon=True)
            for index in range(threads)
        ]
        self._threads.append(
            threading.Thread(target=self._keep, name="kv-sink-keeper", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    def fetch(
        self,
        ticket: KVTicket,
        wanted: Sequence[int],
        targets: Sequence[int],
        deadline: float,
        done: Done,
    ) -> None:
        """See the engine's Importer. Raises ValueError for a caller's mistake: lengths that
        differ, indices or targets that repeat or lie outside, a request that is being fetched."""
        self._check(ticket, wanted, targets)
        job = Job(
            ticket=ticket,
            missing=dict(zip(wanted, targets, strict=True)),
            wanted=tuple(wanted),
            deadline=deadline,
            done=done,
            renew_at=time.monotonic() + ticket.lease_s / 3,
        )
        with self._lock:
            if ticket.request_id in self._jobs:
                raise ValueError(f"The request {ticket.request_id} is being fetched already.")
            closing = self._closing
            self._kept.pop(ticket.request_id, None)
            self._jobs[ticket.request_id] = job
        if closing:
            self._report(job, job.wanted, "The transfer is closed.")
            return
        self._queue.put(job)
        if min(job.deadline, job.renew_at) < self._next_look:
            self._wake.set()

    def _check(self, ticket: KVTicket, wanted: Sequence[int], targets: Sequence[int]) -> None:
        if len(wanted) != len(targets):
            raise ValueError(f"{len(wanted)} blocks cannot go into {len(targets)} targets.")
        if any(a >= b for a, b in itertools.pairwise(wanted)):
            raise ValueError("The wanted blocks must be in ascending order, each once.")
        if wanted and not 0 <= wanted[0] <= wanted[-1] < ticket.num_blocks:
            raise ValueError(f"A wanted block lies outside the ticket's {ticket.num_blocks}.")
        if len(set(targets)) != len(targets):
            raise ValueError("Two blocks cannot go into the same target.")
        if any(not 0 <= target < self._pool.num_blocks for target in targets):
            raise ValueError(f"A target lies outside the pool of {self._pool.num_blocks} blocks.")

    def keep(self, ticket: KVTicket) -> None:
        """Renew the ticket's lease until `fetch` or `drop`: its request waits for room here."""
        with self._lock:
            self._kept[ticket.request_id] = _Kept(ticket, time.monotonic() + ticket.lease_s / 3)
        self._wake.set()

    def drop(self, request_id: str) -> None:
        """Stop renewing: the request ended while it waited. The lease runs out by itself."""
        with self._lock:
            self._kept.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        """Make the fetch of this request end soon; its `done` is still called, from another
        thread. Unknown requests are ignored: the fetch may have ended meanwhile."""
        with self._lock:
            job = self._jobs.get(request_id)
        if job is not None:
            job.stop("The request was cancelled.", Outcome.ABORTED)
            self._wake.set()

    def counters(self) -> SinkCounters:
        with self._lock:
            return SinkCounters(
                fetching=len(self._jobs),
                bytes_in=self._bytes_in,
                fetches=dict(self._fetches),
                transports=dict(self._transports),
                routes=dict(self._routes),
                in_flight=self._credits.in_flight,
            )

    def close(self, timeout_s: float = 3.0) -> None:
        """End all fetches, report them and stop. Idempotent; takes at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            farewell = min(deadline, time.monotonic() + RELEASE_TIMEOUT_S)
            self._release_until = min(self._release_until, farewell)
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop("The transfer was closed.", Outcome.ABORTED)
        for _ in self._threads:
            self._queue.put(None)
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        for job in jobs:  # only those of a thread that is stuck beyond our reach
            self._report(job, job.wanted, "The transfer was closed.")
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The worker threads.

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if job.take():
                    job.start(self._limit_s)
                    self._run(job)
                else:
                    self._release(job)
            except Exception as error:
                log.exception("Fetching for %s failed.", job.ticket.request_id)
                self._report(job, job.wanted, f"The transfer failed: {error}")
                self._release(job)

    def _run(self, job: Job) -> None:
        try:
            self._fetch_all(job)
        except Ended as ended:
            job.reason = str(ended)
        if job.missing:
            self._report(job)  # first, because the source may not answer any more
            self._release(job)
            return
        if not job.stopped:
            job.outcome = Outcome.COMMITTED
        valid = self._release(job)
        if job.borrowed and not valid:
            reason = "The source did not confirm that the lease stood until the copy was made."
            self._report(job, job.wanted, reason)
        else:
            self._report(job)

    def _fetch_all(self, job: Job) -> None:
        """Ask for what is missing until nothing is, or there is nothing left to try. What remains
        in `job.missing` failed for `job.reason`."""
        if difference := self._fingerprint.difference(job.ticket.fingerprint):
            raise Ended(difference)
        names = self._plan(job.ticket)
        if not names:
            raise Ended(
                f"{job.ticket.source} offers the transports {', '.join(job.ticket.transports)}; "
                f"this worker uses {', '.join(self._halves)}."
            )
        tries = 0
        while job.missing and tries < TRIES:
            name = names[0]
            try:
                tries += 1
                self._attempt(job, name)
            except TransportUnfit as error:
                tries -= 1
                job.reason = f"The transport {name} cannot be used: {error}"
                log.info("%s (source %s)", job.reason, job.ticket.source)
                self._avoid(job.ticket, name)
                if len(names) == 1:
                    return
                names = names[1:]
                continue
            except EpochChanged as error:
                job.releasable = False
                raise Ended(str(error)) from None
            except (OSError, ProtocolError) as error:
                job.wait(self._stall_s)  # stopped or late: that is the better reason
                if isinstance(error, TimeoutError):
                    error = TimeoutError(f"it said nothing for {self._stall_s:g} s.")
                job.reason = f"Fetching from {job.ticket.source} over {name} failed: {error}"
            names = names[1:] or names

    def _plan(self, ticket: KVTicket) -> list[str]:
        """The transports to try, best first; those known to be unfit for this source are out,
        unless nothing else is left."""
        common = [name for name in self._halves if name in ticket.transports]
        now = time.monotonic()
        with self._lock:
            fit = [
                name
                for name in common
                if self._unfit.get((ticket.source, ticket.epoch, name), 0.0) <= now
            ]
        return fit or common

    def _avoid(self, ticket: KVTicket, name: str) -> None:
        """Do not try a transport with this source for a while."""
        now = time.monotonic()
        with self._lock:
            self._unfit = {key: until for key, until in self._unfit.items() if until > now}
            self._unfit[(ticket.source, ticket.epoch, name)] = now + UNFIT_S

    def _attempt(self, job: Job, name: str) -> None:
        """Ask for everything missing over one transport. Blocks whose checksum differs stay in
        `job.missing` without an exception."""
        half = self._halves[name]
        job.transport = name
        size = self._pool.block_nbytes
        with (
            self._line(job, job.wait(self._stall_s)) as line,
            self._credits.account(job.ticket.source) as account,
        ):
            waiting = deque(_pieces(list(job.missing), size))
            asked: deque[list[int]] = deque()
            while waiting or asked:
                ahead = len(asked) < ASKED_AHEAD and bool(waiting)
                if ahead and account.take(len(waiting[0]) * size, lambda: job.wait(self._stall_s)):
                    asked.append(waiting.popleft())
                    self._ask(line, job, name, asked[-1])
                    continue
                self._receive(line, job, half, asked[0])
                account.give(len(asked.popleft()) * size)

    def _ask(self, line: Line, job: Job, name: str, piece: Sequence[int]) -> None:
        ticket = job.ticket
        detail = getattr(self._halves[name], "detail", None)
        fetch = Fetch(
            ticket_id=ticket.ticket_id,
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            fingerprint=self._fingerprint,
            transport=name,
            wanted=tuple(piece),
            host_id=self._host_id,
            detail=detail(ticket.source, ticket.epoch) if detail else "",
        )
        line.send(fetch, job.wait(self._stall_s))

    def _receive(self, line: Line, job: Job, half: SinkHalf, piece: Sequence[int]) -> None:
        header = line.receive(_TO_READER, job.wait(self._stall_s))
        self._check_header(header, job.ticket, len(piece))
        job.borrowed = job.borrowed or half.borrows
        targets = [job.missing[index] for index in piece]
        verified = 0
        for complete in half.receive(line, header, targets, lambda: job.wait(self._stall_s)):
            digests = self._pool.digests(targets[verified:complete])
            expected = header.checksums[verified:complete]
            for index, digest, right in zip(
                piece[verified:complete], digests, expected, strict=True
            ):
                if digest == right:
                    del job.missing[index]
                else:
                    job.reason = f"The checksum of block {index} differs."
                    log.warning("%s (%s)", job.reason, job.ticket.request_id)
            received = (complete - verified) * self._pool.block_nbytes
            job.nbytes += received
            verified = complete

    def _check_header(self, header: Any, ticket: KVTicket, count: int) -> None:
        """Raises what a wrong or refusing answer means."""
        if isinstance(header, Refused):
            if header.retry_other_transport:
                raise TransportUnfit(header.reason)
            raise Ended(header.reason)
        if not isinstance(header, FetchHeader):
            raise ProtocolError("The source answered a fetch with another message.")
        if (header.ticket_id, header.epoch) != (ticket.ticket_id, ticket.epoch):
            raise ProtocolError("The source answered for another ticket.")
        if header.num_blocks != count or len(header.checksums) != count:
            raise ProtocolError(f"The source announced {header.num_blocks} blocks, not {count}.")
        if header.block_nbytes != self._pool.block_nbytes:
            raise ProtocolError(
                f"The source's blocks have {header.block_nbytes} bytes, the own ones "
                f"{self._pool.block_nbytes}."
            )

    @contextlib.contextmanager
    def _line(self, job: Job, deadline: float) -> Iterator[Line]:
        """A line that `cancel` can interrupt. Detached before it goes back to the pool."""
        with self._lines.line(Address.of(job.ticket), deadline, job.attach) as line:
            try:
                yield line
            finally:
                job.attach(None)

    def _release(self, job: Job) -> bool:
        """Tell the source that the fetch is over; True if the lease stood until now. Asked again
        on a new connection if the first one fails, since the answer decides about a borrowed copy.
        """
        if not job.releasable:
            return False
        message = Release(
            ticket_id=job.ticket.ticket_id, epoch=job.ticket.epoch, outcome=job.outcome
        )
        deadline = min(time.monotonic() + RELEASE_TIMEOUT_S, self._release_until)
        for _ in range(2):
            try:
                return self._settle(job.ticket, message, deadline)
            except EpochChanged:
                return False
            except (OSError, ProtocolError) as error:
                log.info("Releasing %s failed: %s", job.ticket.request_id, error)
        return False

    def _settle(self, ticket: KVTicket, message: Release | Renew, deadline: float) -> bool:
        """Send a message about a ticket's lease; whether it stands."""
        with self._lines.line(Address.of(ticket), deadline, _nobody) as line:
            line.send(message, deadline)
            answer = line.receive(_TO_READER, deadline)
            if not isinstance(answer, Released) or answer.ticket_id != ticket.ticket_id:
                raise ProtocolError("The source answered a release with another message.")
        return answer.valid

    def _report(self, job: Job, failed: Sequence[int] | None = None, reason: str = "") -> None:
        """Call `done`, unless somebody has. By default what is missing has failed."""
        request_id = job.ticket.request_id
        with self._lock:
            if self._jobs.get(request_id) is not job:
                return
            del self._jobs[request_id]
            failed = sorted(job.missing) if failed is None else failed
            report = FetchReport(
                request_id=request_id,
                failed=tuple(failed),
                reason=(reason or job.reason) if failed else "",
                transport=job.transport,
                nbytes=job.nbytes,
            )
            self._bytes_in += report.nbytes
            self._fetches["ok" if report.ok else "failed"] += 1
            self._transports[report.transport] += 1
            if report.ok and report.nbytes:
                self._routes.pop(job.ticket.source, None)
                self._routes[job.ticket.source] = report.transport
                if len(self._routes) > ROUTES_KEPT:
                    del self._routes[next(iter(self._routes))]
        try:
            job.done(report)
        except Exception:
            log.exception("Reporting the fetch of %s failed.", request_id)

    # The keeper thread.

    def _keep(self) -> None:
        while not self._closing:
            idle_lines = self._lines.sweep(IDLE_S)
            with self._lock:
                jobs = list(self._jobs.values())
                kept = list(self._kept.values())
            now = time.monotonic()
            for one in kept:
                if now >= one.renew_at and not self._renew_kept(one):
                    self.drop(one.ticket.request_id)  # the fetch will find out why
            for job in jobs:
                if (job.stopped or now >= job.deadline) and job.take():
                    reason = job.stopped or "The request's deadline passed in the queue."
                    self._report(job, job.wanted, reason)
                elif now >= job.renew_at:
                    self._renew(job)
            times = [job.renew_at for job in jobs] + [one.renew_at for one in kept]
            times += [job.deadline for job in jobs if not job.taken]
            if idle_lines or jobs:
                times.append(now + SWEEP_S)
            self._next_look = min(times, default=float("inf"))
            left = self._next_look - time.monotonic()
            self._wake.wait(max(0.0, left) if times else None)
            self._wake.clear()

    def _renew_kept(self, kept: _Kept) -> bool:
        """Renew the lease of a ticket that waits; whether that makes sense again."""
        ticket = kept.ticket
        kept.renew_at = time.monotonic() + ticket.lease_s / 3
        message = Renew(ticket_id=ticket.ticket_id, epoch=ticket.epoch)
        try:
            return self._settle(ticket, message, time.monotonic() + RENEW_TIMEOUT_S)
        except EpochChanged:
            return False
        except (OSError, ProtocolError) as error:
            log.info("Renewing the lease of %s failed: %s", ticket.request_id, error)
            return True

    def _renew(self, job: Job) -> None:
        job.renew_at = time.monotonic() + job.ticket.lease_s / 3
        message = Renew(ticket_id=job.ticket.ticket_id, epoch=job.ticket.epoch)
        try:
            valid = self._settle(job.ticket, message, time.monotonic() + RENEW_TIMEOUT_S)
        except (OSError, ProtocolError) as error:
            log.info("Renewing the lease of %s failed: %s", job.ticket.request_id, error)
            return  # the fetch itself finds out what that means
        if not valid:
            job.stop("The lease ended before all KV blocks had arrived.", Outcome.FAILED)


def _nobody(line: Line) -> None:
    """Short exchanges are not interrupted: they have a short deadline."""


def _pieces(indices: list[int], block_nbytes: int) -> list[list[int]]:
    """`indices` cut into growing pieces."""
    pieces, start, nbytes = [], 0, FIRST_PIECE_BYTES
    while start < len(indices):
        length = max(1, nbytes // block_nbytes)
        pieces.append(indices[start : start + length])
        start += length
        nbytes = min(4 * nbytes, LARGEST_PIECE_BYTES)
    return pieces
