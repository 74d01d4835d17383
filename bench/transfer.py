"""How fast KV blocks travel, beside the machine's own limits measured in the same run.

    python -P -m pdserve.bench.transfer [--block-kib 64] [--seconds 1.0] [--max-mib 1024]

The source runs in a process of its own. Per transport, size and number of hand-overs at once, the
limit (a memcpy of as many bytes for shared memory, a bare socket loop for TCP) and the hand-over
are measured in turn, round after round: `p50` is the median time from "tickets received" to "blocks
usable", GB/s and limit are of the medians, and `share` is the median of limit / hand-over of each
round, so that what else the machine does meanwhile hits both. Every round works on another part of
the pools, so that nobody's bytes are in a cache already. `s/GiB` is CPU time of both processes for
hand-overs, checksums included. `first` is the time of the very first one, which also maps the
source's pool and touches its pages.

A ticket rests for a while before it is fetched, as it does while a router passes it on; the source
computes the checksums meanwhile. With --hurry it is fetched at once.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import numpy as np

from pdserve.kv_transfer.line import LOCAL_SEND_BYTES
from pdserve.kv_transfer.memory import HostMemory, Spans
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport

FINGERPRINT = LayoutFingerprint(
    model="bench",
    weights="bench",
    dtype="float32",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=1,
)


STOP = b"stop"
MOST_ROUNDS = 400


class Order(msgspec.Struct, array_like=True):
    """Offer `tickets` runs of `count` blocks each, from block `first` on."""

    first: int
    count: int
    tickets: int
    rest_s: float


class Offered(msgspec.Struct, array_like=True):
    tickets: list[KVTicket]
    cpu_s: float
    """CPU time of the child so far."""


def _source(orders: Connection, secret: str, num_blocks: int, block_nbytes: int) -> None:
    """The child process: mints the tickets that it is asked for. Its other port sends as many
    bytes as it is asked for and does nothing else."""
    memory = HostMemory(num_blocks, block_nbytes)
    spans = Spans(memory)
    spans.span(0, num_blocks)[:] = 7
    bare = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_bare, args=(bare, spans), daemon=True).start()
    with TransferSource(
        memory,
        FINGERPRINT,
        worker_id="source",
        epoch=1,
        host="127.0.0.1",
        secret=secret,
        transports=("shm", "tcp"),
        on_returned=lambda ticket, ending: None,
    ) as source:
        orders.send_bytes(bare.getsockname()[1].to_bytes(8, "little"))
        while (text := orders.recv_bytes()) != STOP:
            order = msgspec.msgpack.decode(text, type=Order)
            count = order.count
            tickets = [
                source.offer(secrets.token_hex(8), range(at, at + count), count, [b""] * count)
                for at in range(order.first, order.first + order.tickets * count, count)
            ]
            time.sleep(order.rest_s)
            answer = Offered(tickets, time.process_time())
            orders.send_bytes(msgspec.msgpack.encode(answer))


def _serve_bare(listener: socket.socket, spans: Spans) -> None:
    everything = spans.span(0, spans.num_blocks)
    with contextlib.suppress(OSError):
        sock, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BYTES)
        while order := sock.recv(16):
            first, length = (int.from_bytes(part, "little") for part in (order[:8], order[8:]))
            sock.sendall(everything[first : first + length].data)


@contextlib.contextmanager
def _started(num_blocks: int, block_nbytes: int, secret: str) -> Iterator[tuple[Connection, int]]:
    """The child's order line and its bare port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_source, args=(theirs, secret, num_blocks, block_nbytes))
    child.start()
    theirs.close()
    try:
        yield ours, int.from_bytes(ours.recv_bytes(), "little")
        ours.send_bytes(STOP)
    finally:
        child.join(10)
        child.kill()


class Parts:
    """Gives out parts of a pool of `total` bytes in turn, each `length` long, in whole units."""

    def __init__(self, total: int, length: int) -> None:
        self._total, self._length, self._next = total, length, 0

    def __call__(self) -> int:
        start = self._next if self._next + self._length <= self._total else 0
        self._next = start + self._length
        return start


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of both sides of each round."""

    limits: list[float]
    taken: list[float]

    @property
    def share(self) -> float:
        return statistics.median(
            limit / taken for limit, taken in zip(self.limits, self.taken, strict=True)
        )


def _alternate(seconds: float, limit: Callable[[], float], once: Callable[[], float]) -> Rounds:
    """Both in turn for at least `seconds` and MOST_ROUNDS at most, after two rounds to warm up."""
    limit(), once(), limit(), once()
    rounds = Rounds([], [])
    until = time.perf_counter() + seconds
    while len(rounds.taken) < 3 or (
        time.perf_counter() < until and len(rounds.taken) < MOST_ROUNDS
    ):
        rounds.limits.append(limit())
        rounds.taken.append(once())
    return rounds


class Bench:
    """One source, one pool to fetch into, and the means to measure both limits."""

    def __init__(self, num_blocks: int, block_nbytes: int, seconds: float, hurry: bool) -> None:
        self.block_nbytes, self._seconds, self._hurry = block_nbytes, seconds, hurry
        self.num_blocks = num_blocks
        self.memory = HostMemory(num_blocks, block_nbytes)
        self._other = HostMemory(num_blocks, block_nbytes)
        self._mine = Spans(self.memory).span(0, num_blocks)
        self._theirs = Spans(self._other).span(0, num_blocks)
        self._mine[:] = 1
        self._theirs[:] = 7
        self._child_cpu = 0.0

    def limit(self, transport: str, nbytes: int, bare: socket.socket) -> Callable[[], float]:
        """What measures the seconds that the bytes alone take, once."""
        parts = Parts(len(self._mine), nbytes)
        if transport == "shm":
            return lambda: self._memcpy(parts(), nbytes)
        return lambda: self._bare(bare, parts(), nbytes)

    def _memcpy(self, first: int, nbytes: int) -> float:
        start = time.perf_counter()
        np.copyto(self._mine[first : first + nbytes], self._theirs[first : first + nbytes])
        return time.perf_counter() - start

    def _bare(self, sock: socket.socket, first: int, nbytes: int) -> float:
        target = self._mine[first : first + nbytes].data
        start = time.perf_counter()
        sock.sendall(first.to_bytes(8, "little") + nbytes.to_bytes(8, "little"))
        received = 0
        while received < nbytes:
            received += sock.recv_into(target[received:])
        return time.perf_counter() - start

    def _offered(self, orders: Connection, first: int, count: int, at_once: int) -> list[KVTicket]:
        rest = 0.0 if self._hurry else 0.002 + at_once * count * self.block_nbytes / 3e9
        orders.send_bytes(msgspec.msgpack.encode(Order(first, count, at_once, rest)))
        offered = msgspec.msgpack.decode(orders.recv_bytes(), type=Offered)
        self._child_cpu = offered.cpu_s
        return offered.tickets

    def hand_over(
        self, orders: Connection, sink: TransferSink, first: int, count: int, at_once: int
    ) -> float:
        tickets = self._offered(orders, first, count, at_once)
        reports: queue.SimpleQueue[FetchReport] = queue.SimpleQueue()
        start, deadline = time.perf_counter(), time.monotonic() + 60
        for number, ticket in enumerate(tickets):
            target = first + number * count
            sink.fetch(ticket, range(count), range(target, target + count), deadline, reports.put)
        for _ in tickets:
            report = reports.get(timeout=70)
            if not report.ok:
                raise SystemExit(f"A hand-over failed: {report}")
        return time.perf_counter() - start

    def row(
        self,
        name: str,
        orders: Connection,
        sink: TransferSink,
        count: int,
        at_once: int,
        limit: Callable[[], float],
    ) -> str:
        nbytes = count * at_once * self.block_nbytes
        parts = Parts(self.num_blocks, count * at_once)
        spent = 0.0

        def once() -> float:
            nonlocal spent
            before = time.process_time() + self._child_cpu
            taken = self.hand_over(orders, sink, parts(), count, at_once)
            self._offered(orders, 0, count, 0)  # for the child's CPU time
            spent += time.process_time() + self._child_cpu - before
            return taken

        self._offered(orders, 0, count, 0)
        rounds = _alternate(self._seconds, limit, once)
        middle, best = statistics.median(rounds.taken), statistics.median(rounds.limits)
        cpu = spent / (len(rounds.taken) + 2)
        return (
            f"{name:10}{count * self.block_nbytes / 2**20:9.2f}{at_once:8}{middle * 1e3:10.3f}"
            f"{nbytes / middle / 1e9:8.2f}{nbytes / best / 1e9:8.2f}"
            f"{rounds.share:8.0%}{cpu * 2**30 / nbytes:8.3f}"
        )

    def close(self) -> None:
        self.memory.close()
        self._other.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--block-kib", type=int, default=64, help="KiB per block (default 64)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line (default 1 s)")
    parser.add_argument("--max-mib", type=int, default=1024, help="largest size (default 1024 MiB)")
    parser.add_argument("--transport", choices=("shm", "tcp"), help="only this one (default both)")
    parser.add_argument("--hurry", action="store_true", help="fetch tickets as soon as they exist")
    options = parser.parse_args()
    num_blocks = max(1, options.max_mib * 2**10 // options.block_kib)
    block_nbytes = options.block_kib * 2**10
    sizes = [count for count in (1, 4, 16, 64, 256, 1024, 4096) if count < num_blocks]
    plans = [(count, 1) for count in [*sizes, num_blocks]]
    plans += [(count, many) for count in (1, 64) for many in (8, 64) if count * many <= num_blocks]
    secret = secrets.token_hex(16)
    bench = Bench(num_blocks, block_nbytes, options.seconds, options.hurry)
    print(f"Blocks of {options.block_kib} KiB, source in its own process.")
    heads = (
        ("MiB", 9), ("at once", 8), ("p50 ms", 10), ("GB/s", 8), ("limit", 8),
        ("share", 8), ("s/GiB", 8),
    )  # fmt: skip
    print("transport " + "".join(f"{text:>{width}}" for text, width in heads))
    with (
        _started(num_blocks, block_nbytes, secret) as (orders, port),
        socket.create_connection(("127.0.0.1", port)) as bare,
    ):
        for name in (options.transport,) if options.transport else ("shm", "tcp"):
            with TransferSink(
                bench.memory, FINGERPRINT, name="sink", secret=secret, transport=name
            ) as sink:
                first = bench.hand_over(orders, sink, 0, num_blocks, 1)
                print(f"{name:10}{num_blocks * block_nbytes / 2**20:9.2f}   first: {first:.3f} s")
                for count, many in plans:
                    limit = bench.limit(name, count * many * block_nbytes, bare)
                    print(bench.row(name, orders, sink, count, many, limit), flush=True)
    bench.close()


if __name__ == "__main__":
    main()
