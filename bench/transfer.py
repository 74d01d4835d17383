"""How fast KV blocks travel, beside the machine's own limits measured in the same run.

    python -P -m pdserve.bench.transfer [--block-kib 64] [--seconds 1.0] [--max-mib 1024]

The source runs in a process of its own. Per transport, size and number of hand-overs at once, the
limit (a memcpy of as many bytes for shared memory, a bare socket loop for TCP, with --device cuda a
copy within the device for CUDA IPC and NCCL) and the hand-over are measured in turn, round after
round: `p50` is the median time from "tickets received" to "blocks usable", GB/s and limit are of
the medians, and `share` is the median of limit / hand-over of each round, so that what else the
machine does meanwhile hits both. Every round works on another part of the pools, so that nobody's
bytes are in a cache already. `s/GiB` is CPU time of both processes for hand-overs, checksums
included. `first` is the time of the very first one, which also maps the source's pool and touches
its pages.

A ticket rests for a while before it is fetched, as it does while a router passes it on; the source
computes the checksums meanwhile. With --hurry it is fetched at once. With --inject-faults (see
`kv_transfer/faults.py`) what arrives is spoiled now and then: the last column then says how many
hand-overs were given up after the second try, which an engine would compute itself.

On one GPU two NCCL ranks count as two hosts, with sockets between them: its figures say that it
works, not how fast it is between GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
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
import torch

from pdserve.kv_transfer import cuda_ipc
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.faults import Dice, Faults, faulty_sink
from pdserve.kv_transfer.line import LOCAL_SEND_BYTES
from pdserve.kv_transfer.memory import HostMemory, Spans
from pdserve.kv_transfer.nccl import open_nccl, sink_halves, source_halves
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES
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


def _source(orders: Connection, secret: str, pool: Size) -> None:
    """The child process: mints the tickets that it is asked for. Its other port sends as many
    bytes as it is asked for and does nothing else."""
    if pool.device == "cuda":
        _another_host("source")
    memory = pool.make(7)
    bare = socket.create_server(("127.0.0.1", 0))
    if isinstance(memory, HostMemory):
        threading.Thread(target=_serve_bare, args=(bare, Spans(memory)), daemon=True).start()
    halves = source_halves(open_nccl(memory, "auto"), SOURCE_HALVES)
    halves = cuda_ipc.source_halves(cuda_ipc.open_ipc(memory, "auto"), halves)
    with TransferSource(
        memory,
        FINGERPRINT,
        worker_id="source",
        epoch=1,
        host="127.0.0.1",
        secret=secret,
        transports=pool.transports,
        halves=halves,
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


def _another_host(name: str) -> None:
    """Two NCCL ranks on one GPU must seem to be on two hosts. Before NCCL is loaded."""
    os.environ |= {
        "NCCL_HOSTID": f"pdserve-{name}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0",
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """Of the pools on both sides."""

    num_blocks: int
    block_nbytes: int
    device: str

    @property
    def transports(self) -> tuple[str, ...]:
        return ("ipc", "nccl") if self.device == "cuda" else ("shm", "tcp")

    def make(self, value: int) -> HostMemory | DeviceMemory:
        """A pool of which every byte is `value`."""
        if self.device == "cuda":
            shape = (self.num_blocks, self.block_nbytes)
            return DeviceMemory(torch.full(shape, value, dtype=torch.uint8, device="cuda"))
        memory = HostMemory(self.num_blocks, self.block_nbytes)
        Spans(memory).span(0, self.num_blocks)[:] = value
        return memory


@contextlib.contextmanager
def _started(size: Size, secret: str) -> Iterator[tuple[Connection, int]]:
    """The child's order line and its bare port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_source, args=(theirs, secret, size))
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
    """One source, one pool to fetch into, and the means to measure the limits."""

    def __init__(self, size: Size, seconds: float, hurry: bool, faults: str = "") -> None:
        self.block_nbytes, self._seconds, self._hurry = size.block_nbytes, seconds, hurry
        self.num_blocks = size.num_blocks
        self._dice = Dice(Faults.parse(faults)) if faults else None
        self._given_up = 0
        self._summed = 3e11 if size.device == "cuda" else 3e9
        """Bytes per second that a source surely sums."""
        self.memory, self._other = size.make(1), size.make(7)
        if isinstance(self.memory, HostMemory) and isinstance(self._other, HostMemory):
            self._mine = Spans(self.memory).span(0, size.num_blocks)
            self._theirs = Spans(self._other).span(0, size.num_blocks)
        self._child_cpu = 0.0

    def sink(self, transport: str, secret: str) -> TransferSink:
        halves = sink_halves(open_nccl(self.memory, "auto"), SINK_HALVES)
        halves = cuda_ipc.sink_halves(cuda_ipc.open_ipc(self.memory, "auto"), halves)
        if self._dice is not None:
            halves = faulty_sink(halves, self._dice)
        return TransferSink(
            self.memory, FINGERPRINT, name="sink", secret=secret, transport=transport, halves=halves
        )

    def limit(self, transport: str, nbytes: int, bare: socket.socket) -> Callable[[], float]:
        """What measures the seconds that the bytes alone take, once."""
        parts = Parts(self.num_blocks * self.block_nbytes, nbytes)
        if transport == "tcp":
            return lambda: self._bare(bare, parts(), nbytes)
        copy = self._memcpy if transport == "shm" else self._device_copy
        return lambda: copy(parts(), nbytes)

    def _device_copy(self, first: int, nbytes: int) -> float:
        assert isinstance(self.memory, DeviceMemory) and isinstance(self._other, DeviceMemory)
        mine, theirs = (
            memory.blocks.view(-1)[first : first + nbytes] for memory in (self.memory, self._other)
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        mine.copy_(theirs)
        torch.cuda.synchronize()
        return time.perf_counter() - start

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
        rest = 0.0 if self._hurry else 0.002 + at_once * count * self.block_nbytes / self._summed
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
            if not report.ok and self._dice is None:
                raise SystemExit(f"A hand-over failed: {report}")
            self._given_up += not report.ok
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
        given_up, self._given_up = self._given_up / (len(rounds.taken) + 2) / at_once, 0
        return (
            f"{name:10}{count * self.block_nbytes / 2**20:9.2f}{at_once:8}{middle * 1e3:10.3f}"
            f"{nbytes / middle / 1e9:8.2f}{nbytes / best / 1e9:8.2f}"
            f"{rounds.share:8.0%}{cpu * 2**30 / nbytes:8.3f}"
        ) + (f"{given_up:10.1%}" if self._dice else "")

    def close(self) -> None:
        for memory in (self.memory, self._other):
            if isinstance(memory, HostMemory):
                memory.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--block-kib", type=int, default=64, help="KiB per block (default 64)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line (default 1 s)")
    parser.add_argument("--max-mib", type=int, default=1024, help="largest size (default 1024 MiB)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where pools lie")
    parser.add_argument("--transport", help="shm or tcp, on cuda ipc or nccl (default both)")
    parser.add_argument(
        "--inject-faults", default="", metavar="SPEC", help="e.g. flip=0.1,drop=0.1"
    )
    parser.add_argument("--hurry", action="store_true", help="fetch tickets as soon as they exist")
    options = parser.parse_args()
    num_blocks = max(1, options.max_mib * 2**10 // options.block_kib)
    size = Size(num_blocks, options.block_kib * 2**10, options.device)
    if options.transport and options.transport not in size.transports:
        parser.error(f"--transport is one of {', '.join(size.transports)} on {size.device}")
    if size.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA device here")
        _another_host("sink")
    block_nbytes = size.block_nbytes
    sizes = [count for count in (1, 4, 16, 64, 256, 1024, 4096) if count < num_blocks]
    plans = [(count, 1) for count in [*sizes, num_blocks]]
    plans += [(count, many) for count in (1, 64) for many in (8, 64) if count * many <= num_blocks]
    secret = secrets.token_hex(16)
    bench = Bench(size, options.seconds, options.hurry, options.inject_faults)
    print(f"Blocks of {options.block_kib} KiB, source in its own process.")
    heads = (
        ("MiB", 9), ("at once", 8), ("p50 ms", 10), ("GB/s", 8), ("limit", 8),
        ("share", 8), ("s/GiB", 8),
    )  # fmt: skip
    if options.inject_faults:
        logging.getLogger("pdserve").setLevel(logging.CRITICAL)  # of what is done on purpose
    more = f"{'given up':>10}" if options.inject_faults else ""
    print("transport " + "".join(f"{text:>{width}}" for text, width in heads) + more)
    with (
        _started(size, secret) as (orders, port),
        socket.create_connection(("127.0.0.1", port)) as bare,
    ):
        for name in (options.transport,) if options.transport else size.transports:
            with bench.sink(name, secret) as sink:
                first = bench.hand_over(orders, sink, 0, num_blocks, 1)
                print(f"{name:10}{num_blocks * block_nbytes / 2**20:9.2f}   first: {first:.3f} s")
                for count, many in plans:
                    limit = bench.limit(name, count * many * block_nbytes, bare)
                    print(bench.row(name, orders, sink, count, many, limit), flush=True)
    bench.close()
    if size.device == "cpu":
        print("CUDA IPC and NCCL, where there is a GPU: --device cuda")


if __name__ == "__main__":
    main()
