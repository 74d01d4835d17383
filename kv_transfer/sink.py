"""The sink: the engine's importer, which fetches tickets' blocks into the own pool.

A fetch waits in a queue (`fair.py`) until one of a few threads takes it. That thread asks for the
wanted blocks over the best transport (`attempt.py`), once more (over the next transport, if there
is one, `routes.py`) for blocks that did not arrive intact, releases the ticket (`leases.py`) and
reports. One more thread keeps the leases of all fetches alive, waiting ones included, ends those
that time out in the queue and closes connections that nobody needs. A ticket that still grows has a
thread of its own, which mostly waits for the source (`growth.py`).

    QUEUED ──► ACTIVE ──► DONE      done(report) is called on entering DONE, exactly once;
       └─────────────────►          the targets belong to the transfer until then
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pdserve.kv_transfer.attempt import Attempts
from pdserve.kv_transfer.credits import Credits
from pdserve.kv_transfer.fair import FairQueue
from pdserve.kv_transfer.growth import follow
from pdserve.kv_transfer.job import Done, Ended, Job
from pdserve.kv_transfer.layout import LayoutError
from pdserve.kv_transfer.leases import Leases
from pdserve.kv_transfer.line import EpochChanged, LinePool
from pdserve.kv_transfer.memory import BlockMemory, Pool, as_pool
from pdserve.kv_transfer.missing import Missing, Units, rising, units_of
from pdserve.kv_transfer.parcels import Packing, agree
from pdserve.kv_transfer.routes import Routes
from pdserve.kv_transfer.slices import Cuts, units
from pdserve.kv_transfer.transports import SINK_HALVES, SinkHalf, TransportUnfit, Unpacking
from pdserve.protocol.errors import ProtocolError
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport, Outcome, Progress

log = logging.getLogger(__name__)

TRIES = 2
"""Times that a block is asked for; a transport that turns out unfit does not count."""
SWEEP_S = 1.0
IDLE_S = 60.0
"""Unused connections are closed after this; well before the source would."""


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
    speeds: dict[str, dict[str, float]]
    """Source → transport → bytes per second, where large fetches have shown it."""
    in_flight: int
    """Bytes asked for and not yet received."""
    failed_releases: int
    """Sources that could not be told that their blocks are not needed any more."""


class TransferSink:
    """Fetches into `memory` until `close`. Satisfies the engine's Importer.

    `transport` is "auto" (the best that both sides have by capability and measured speed, the next
    one if it fails) or the name of the only one to use. `stall_s`: a peer that says nothing for so
    long is given up; `limit_s`: a fetch that takes so long from its start (not counting the queue)
    is given up. `halves` are the transports' implementations, best first. `in_flight_per_source`,
    `in_flight`: bytes that may have been asked for and not yet received. `growing`:
    growing tickets fetched at the same time; further ones fail at once. `wire`: "int8" or "fp8" for
    blocks that travel packed, not exactly; `converts`: whether another dtype is taken over.
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
        growing: int = 32,
        wire: str = "",
        converts: bool = False,
    ) -> None:
        """Raises ValueError if the transport is unknown or a limit makes no sense."""
        halves = SINK_HALVES if halves is None else halves
        if transport != "auto" and transport not in halves:
            known = ", ".join(["auto", *halves])
            raise ValueError(f"The transport must be one of {known}. Given: {transport!r}.")
        self._pool = as_pool(memory)
        self._fingerprint = fingerprint
        chosen = {
            key: make(self._pool) for key, make in halves.items() if transport in ("auto", key)
        }
        self._stall_s, self._limit_s = stall_s, limit_s
        self._credits = Credits(in_flight_per_source, in_flight)
        # The name is made unique, so that the source never takes a restarted sink for its old self.
        self._lines = LinePool(secret=secret, name=f"{name}#{secrets.token_hex(4)}")
        self._leases = Leases(self._lines)
        self._routes = Routes(chosen)
        self._cuts = Cuts(self._pool, chosen)
        self._attempts = Attempts(
            self._cuts,
            fingerprint,
            lines=self._lines,
            credits=self._credits,
            stall_s=stall_s,
        )
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._bytes_in = 0
        self._fetches: Counter[str] = Counter()
        self._transports: Counter[str] = Counter()
        self._closing = False
        self._most_growing = growing
        self._wire, self._converts = wire, converts
        self._growing: set[threading.Thread] = set()
        self._next_look = float("inf")
        """When the keeper looks again by itself."""
        self._queue = FairQueue(max(1, threads - 1))
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
        blocks, places = units_of(wanted), units_of(targets)
        self._check(ticket, blocks, places)
        slices = self._slices(ticket)
        job = Job(
            ticket=ticket,
            missing=Missing(units(blocks, slices), units(places, slices)),
            slices=slices,
            wanted=tuple(wanted),
            deadline=deadline,
            done=done,
            renew_at=time.monotonic() + ticket.lease_s / 3,
            ready=Progress(blocks=0 if ticket.growing else ticket.num_blocks),
            growing=ticket.growing,
            block_size=self._fingerprint.block_size,
        )
        with self._lock:
            if ticket.request_id in self._jobs:
                raise ValueError(f"The request {ticket.request_id} is being fetched already.")
            closing = self._closing
            self._jobs[ticket.request_id] = job
        self._leases.drop(ticket.request_id)
        if closing:
            self._report(job, job.wanted, "The transfer is closed.")
            return
        if job.growing:
            self._start_growing(job)
        else:
            self._queue.put(job)
        if min(job.deadline, job.renew_at) < self._next_look:
            self._wake.set()

    def _slices(self, ticket: KVTicket) -> int:
        """Into how many slices to cut its blocks: as many as become ready one after the other,
        where blocks travel as they are."""
        alike = self._fingerprint.difference(ticket.fingerprint) is None and not self._wire
        return ticket.slices if ticket.growing and alike and self._cuts.can(ticket.slices) else 1

    def _start_growing(self, job: Job) -> None:
        name = "kv-sink-growing"
        thread = threading.Thread(target=self._grow, args=(job,), name=name, daemon=True)
        with self._lock:
            room = len(self._growing) < self._most_growing
            if room:
                self._growing.add(thread)
        reason = f"{self._most_growing} growing tickets are being fetched already."
        if room:
            try:
                thread.start()
                return
            except RuntimeError as error:  # the process has too many
                reason = f"A growing ticket needs a thread: {error}."
                with self._lock:
                    self._growing.discard(thread)
        self._report(job, job.wanted, reason)

    def _check(self, ticket: KVTicket, wanted: Units, targets: Units) -> None:
        if len(wanted) != len(targets):
            raise ValueError(f"{len(wanted)} blocks cannot go into {len(targets)} targets.")
        if not rising(wanted):
            raise ValueError("The wanted blocks must be in ascending order, each once.")
        count = -(-ticket.num_tokens // self._fingerprint.block_size)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < count:
            raise ValueError(f"A wanted block lies outside the ticket's {count}.")
        ordered = targets if rising(targets) else np.sort(targets)
        if not rising(ordered):
            raise ValueError("Two blocks cannot go into the same target.")
        if len(targets) and not 0 <= ordered[0] <= ordered[-1] < self._pool.num_blocks:
            raise ValueError(f"A target lies outside the pool of {self._pool.num_blocks} blocks.")

    def keep(self, ticket: KVTicket) -> None:
        """Renew the ticket's lease until `fetch` or `drop`: its request waits for room here."""
        self._leases.keep(ticket)
        self._wake.set()

    def drop(self, request_id: str) -> None:
        """Stop renewing: the request ended while it waited. The lease runs out by itself."""
        self._leases.drop(request_id)

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
                routes=self._routes.used(),
                speeds=self._routes.speeds(),
                in_flight=self._credits.in_flight,
                failed_releases=self._leases.failed,
            )

    def close(self, timeout_s: float = 3.0) -> None:
        """End all fetches, report them and stop. Idempotent; takes at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            jobs = list(self._jobs.values())
            growing = list(self._growing)
        self._leases.close(deadline)
        for job in jobs:
            job.stop("The transfer was closed.", Outcome.ABORTED)
        self._queue.close()
        self._wake.set()
        for thread in [*self._threads, *growing]:
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
        while (job := self._queue.take()) is not None:
            self._attend(job)
            self._queue.done(job)

    def _grow(self, job: Job) -> None:
        try:
            self._attend(job)
        finally:
            with self._lock:
                self._growing.discard(threading.current_thread())

    def _attend(self, job: Job) -> None:
        try:
            if job.take():
                self._run(job)
            else:
                self._leases.release(job)
        except Exception as error:
            log.exception("Fetching for %s failed.", job.ticket.request_id)
            self._report(job, job.wanted, f"The transfer failed: {error}")
            self._leases.release(job)
        finally:
            job.lease = None  # this thread may remember the job for long

    def _run(self, job: Job) -> None:
        try:
            while True:
                if job.growing:
                    self._follow(job)
                if not job.growing:
                    job.start(self._limit_s)
                self._fetch_due(job)
                if len(job.due) or not job.growing:
                    break
        except Ended as ended:
            job.reason = str(ended)
        if job.missing or job.growing:
            # First, because the source may not answer any more. A ticket that ended before its
            # prompt was complete is worth nothing, whatever came and even if nothing was wanted.
            last = (job.num_blocks - 1,)
            self._report(job, (job.wanted or last) if job.growing else None)
            self._leases.release(job)
            return
        if not job.stopped:
            job.outcome = Outcome.COMMITTED
        # What was sent, nothing that the source says can change; nor a copy of blocks that are seen
        # to be the ticket's still.
        if not job.borrowed or (job.lease is not None and job.lease.stands()):
            self._report(job)
            time.sleep(0)  # the engine's thread comes first, which waits for the interpreter
        if self._leases.release(job):
            self._report(job)
        else:
            reason = "The source did not confirm that the lease stood until the copy was made."
            self._report(job, job.wanted, reason)

    def _follow(self, job: Job) -> None:
        """Wait for the source to have more; asked once more on a new connection. Raises Ended."""
        for last in (False, True):
            try:
                follow(job, self._lines, self._stall_s)
                return
            except EpochChanged as error:
                job.releasable = False
                raise Ended(str(error)) from None
            except (OSError, ProtocolError) as error:
                job.wait(self._stall_s)  # stopped or late: that is the better reason
                if last:
                    source = job.ticket.source
                    raise Ended(f"Asking {source} for its progress failed: {error}") from None

    def _fetch_due(self, job: Job) -> None:
        """Ask for what is due until nothing is, or there is nothing left to try. What remains in
        `job.due` failed for `job.reason`."""
        self._reconcile(job)
        nbytes = len(job.due) * self._attempts.nbytes(job)
        names = self._routes.plan(job.ticket, nbytes, lambda name: self._attempts.suits(name, job))
        if not names:
            raise Ended(
                f"{job.ticket.source} offers the transports {', '.join(job.ticket.transports)}; "
                f"this worker uses {', '.join(self._routes.names)}."
            )
        tries = 0
        while len(job.due) and tries < TRIES:
            name = names[0]
            try:
                tries += 1
                due, moved, moving_s = len(job.due), job.nbytes, job.moving_s
                self._attempts.make(job, name)
                self._routes.measured(
                    job.ticket.source, name, job.nbytes - moved, job.moving_s - moving_s
                )
                if tries == 1 and len(job.due) == due > 1:
                    self._routes.avoid(job.ticket, name)  # it changes whatever it brings
            except TransportUnfit as error:
                tries -= 1
                job.reason = f"The transport {name} cannot be used: {error}"
                log.info("%s (source %s)", job.reason, job.ticket.source)
                self._routes.avoid(job.ticket, name)
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

    def _reconcile(self, job: Job) -> None:
        """Find out what to ask the source for. Raises Ended if the layouts differ too much."""
        mine, theirs = self._fingerprint, job.ticket.fingerprint
        try:
            parcels = agree(mine, theirs, wire=self._wire, converts=self._converts)
        except LayoutError as error:
            raise Ended(str(error)) from None
        if parcels is not None and job.unpacking is None:
            missing = job.missing
            numbers = dict(zip(missing.targets.tolist(), missing.units.tolist(), strict=True))
            own, other = Packing(mine, parcels), Packing(theirs, parcels)
            job.unpacking = Unpacking(self._pool, own, other, numbers)

    def _report(self, job: Job, failed: Sequence[int] | None = None, reason: str = "") -> None:
        """Call `done`, unless somebody has. By default what is missing has failed."""
        request_id = job.ticket.request_id
        with self._lock:
            if self._jobs.get(request_id) is not job:
                return
            del self._jobs[request_id]
            failed = job.failed if failed is None else failed
            report = FetchReport(
                request_id=request_id,
                failed=tuple(failed),
                reason=(reason or job.reason) if failed else "",
                transport=job.transport,
                nbytes=job.nbytes,
                blocks=job.arrived,
                took_s=job.took_s,
                asking_s=job.asking_s,
            )
            self._bytes_in += report.nbytes
            self._fetches["ok" if report.ok else "failed"] += 1
            self._transports[report.transport] += 1
        if report.ok and report.nbytes:
            self._routes.note(job.ticket.source, report.transport)
        try:
            job.done(report)
        except Exception:
            log.exception("Reporting the fetch of %s failed.", request_id)

    # The keeper thread.

    def _keep(self) -> None:
        while not self._closing:
            idle_lines = self._lines.sweep(IDLE_S)
            kept_until = self._leases.renew_kept()
            with self._lock:
                jobs = list(self._jobs.values())
            now = time.monotonic()
            for job in jobs:
                if (job.stopped or now >= job.deadline) and job.take():
                    reason = job.stopped or "The request's deadline passed in the queue."
                    self._report(job, job.wanted, reason)
                elif now >= job.renew_at:
                    self._leases.renew(job)
            times = [kept_until, *(job.renew_at for job in jobs)]
            times += [job.deadline for job in jobs if not job.taken]
            if idle_lines or jobs:
                times.append(now + SWEEP_S)
            self._next_look = min(times)
            left = self._next_look - time.monotonic()
            self._wake.wait(max(0.0, left) if self._next_look < float("inf") else None)
            self._wake.clear()
