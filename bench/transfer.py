"""How fast KV blocks travel, beside the machine's own limits measured in the same run.

    python -P -m pdserve.bench.transfer [--block-kib 64] [--seconds 1.0] [--max-mib 256]

The source runs in a process of its own. Per transport and size, one hand-over at a time:
`p50` and `best` are the times from "ticket received" to "blocks usable", GB/s is of the best one,
and the last column divides it by the limit: a memcpy of as many bytes for shared memory, a bare
socket loop for TCP.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import numpy as np

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


def _source(orders: Connection, secret: str, num_blocks: int, block_nbytes: int) -> None:
    """The child process: mints a ticket for each number of blocks that it is sent. Its other
    port sends as many bytes as it is asked for and does nothing else."""
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
        while count := int.from_bytes(orders.recv_bytes(), "little"):
            ticket = source.offer(secrets.token_hex(8), range(count), count, [b""] * count)
            orders.send_bytes(msgspec.msgpack.encode(ticket))


def _serve_bare(listener: socket.socket, spans: Spans) -> None:
    everything = spans.span(0, spans.num_blocks)
    with contextlib.suppress(OSError):
        sock, _ = listener.accept()
        while order := sock.recv(8):
            sock.sendall(everything[: int.from_bytes(order, "little")].data)


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
        ours.send_bytes((0).to_bytes(8, "little"))
    finally:
        child.join(10)
        child.kill()


def _times(seconds: float, once: Callable[[], float]) -> list[float]:
    """Seconds that `once` took, over and over for at least `seconds`, after two to warm up."""
    once(), once()
    until = time.perf_counter() + seconds
    taken = [once() for _ in range(3)]
    while time.perf_counter() < until:
        taken.append(once())
    return taken


def _hand_over(orders: Connection, sink: TransferSink, count: int) -> float:
    orders.send_bytes(count.to_bytes(8, "little"))
    ticket = msgspec.msgpack.decode(orders.recv_bytes(), type=KVTicket)
    reports: list[FetchReport] = []
    arrived = threading.Event()

    def done(report: FetchReport) -> None:
        reports.append(report)
        arrived.set()

    start = time.perf_counter()
    sink.fetch(ticket, range(count), range(count), time.monotonic() + 60, done)
    if not arrived.wait(70) or not reports[0].ok:
        raise SystemExit(f"A hand-over failed: {reports}")
    return time.perf_counter() - start


def _bare(sock: socket.socket, target: memoryview) -> float:
    start = time.perf_counter()
    sock.sendall(len(target).to_bytes(8, "little"))
    received = 0
    while received < len(target):
        received += sock.recv_into(target[received:])
    return time.perf_counter() - start


def _memcpy(target: np.ndarray, source: np.ndarray) -> float:
    start = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - start


def _row(
    name: str,
    orders: Connection,
    sink: TransferSink,
    count: int,
    nbytes: int,
    limit: float,
    seconds: float,
) -> str:
    taken = _times(seconds, lambda: _hand_over(orders, sink, count))
    best, middle = min(taken), statistics.median(taken)
    return (
        f"{name:10}{nbytes / 2**20:9.2f}{middle * 1e3:10.3f}{best * 1e3:10.3f}"
        f"{nbytes / best / 1e9:8.2f}{nbytes / limit / 1e9:8.2f}{limit / best:8.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--block-kib", type=int, default=64, help="KiB per block (default 64)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line (default 1 s)")
    parser.add_argument("--max-mib", type=int, default=256, help="largest size (default 256 MiB)")
    options = parser.parse_args()
    block_nbytes, seconds = options.block_kib * 2**10, options.seconds
    num_blocks = max(1, options.max_mib * 2**20 // block_nbytes)
    counts = [count for count in (1, 4, 16, 64, 256, 1024) if count < num_blocks] + [num_blocks]
    secret = secrets.token_hex(16)
    memory, other = HostMemory(num_blocks, block_nbytes), HostMemory(num_blocks, block_nbytes)
    mine, source = Spans(memory).span(0, num_blocks), Spans(other).span(0, num_blocks)
    source[:] = 7

    def limit(transport: str, nbytes: int, bare: socket.socket) -> float:
        part = mine[:nbytes]
        if transport == "shm":
            return min(_times(seconds / 2, lambda: _memcpy(part, source[:nbytes])))
        return min(_times(seconds / 2, lambda: _bare(bare, part.data)))

    print(f"Blocks of {options.block_kib} KiB, one hand-over at a time, source in its own process.")
    heads = ("MiB", 9), ("p50 ms", 10), ("best ms", 10), ("GB/s", 8), ("limit", 8), ("share", 8)
    print("transport " + "".join(f"{text:>{width}}" for text, width in heads))
    with (
        _started(num_blocks, block_nbytes, secret) as (orders, port),
        socket.create_connection(("127.0.0.1", port)) as bare,
    ):
        for name in ("shm", "tcp"):
            with TransferSink(
                memory, FINGERPRINT, name="sink", secret=secret, transport=name
            ) as sink:
                for count in counts:
                    nbytes = count * block_nbytes
                    best = limit(name, nbytes, bare)
                    print(_row(name, orders, sink, count, nbytes, best, seconds), flush=True)
    memory.close()
    other.close()


if __name__ == "__main__":
    main()
