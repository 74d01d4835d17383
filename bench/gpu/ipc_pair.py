"""Two processes on one GPU hand KV blocks over through CUDA IPC: does it work here, how fast?

The limit is a copy of as many bytes within the device, measured in turn with the hand-overs. The
last line printed is the result; exit code 1 if it failed.
"""

from __future__ import annotations

import multiprocessing
import queue
import secrets
import statistics
import sys
import time
from multiprocessing.connection import Connection

import msgspec
import torch

from pdserve.kv_transfer import cuda_ipc
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport

BLOCKS, BLOCK_NBYTES = 512, 2 << 20
COUNT = 256
"""Blocks per hand-over."""
ROUNDS = 20
DEADLINE_S = 45.0
FINGERPRINT = LayoutFingerprint(
    model="m", weights="w", dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=1, block_size=1
)


def pool(value: int) -> DeviceMemory:
    blocks = torch.full((BLOCKS, BLOCK_NBYTES), value, dtype=torch.uint8, device="cuda")
    blocks.view(torch.int64)[:, 0] = torch.arange(BLOCKS, device="cuda") * value
    torch.cuda.synchronize()
    return DeviceMemory(blocks)


def serve(pipe: Connection, secret: str) -> None:
    """The child: a ticket for each message, until the pipe ends."""
    memory = pool(7)
    runtime = cuda_ipc.open_ipc(memory, "ipc")
    with TransferSource(
        memory,
        FINGERPRINT,
        worker_id="source",
        epoch=1,
        host="127.0.0.1",
        secret=secret,
        transports=("ipc",),
        halves=cuda_ipc.source_halves(runtime, SOURCE_HALVES),
        on_returned=lambda ticket, ending: None,
    ) as source:
        while name := pipe.recv_bytes():
            ticket = source.offer(name.decode(), range(COUNT), COUNT, [b"h"] * COUNT)
            pipe.send_bytes(msgspec.msgpack.encode(ticket))


def fetch(sink: TransferSink, pipe: Connection, number: int) -> float:
    """Seconds of one hand-over."""
    pipe.send_bytes(f"r{number}".encode())
    if not pipe.poll(DEADLINE_S):
        raise SystemExit(f"The source made no ticket within {DEADLINE_S:.0f} s.")
    ticket = msgspec.msgpack.decode(pipe.recv_bytes(), type=KVTicket)
    reports: queue.SimpleQueue[FetchReport] = queue.SimpleQueue()
    begun = time.perf_counter()
    targets = range(BLOCKS - COUNT, BLOCKS)
    sink.fetch(ticket, range(COUNT), targets, time.monotonic() + DEADLINE_S, reports.put)
    report = reports.get(timeout=2 * DEADLINE_S)
    if not report.ok:
        raise SystemExit(f"The hand-over failed: {report.reason}")
    return time.perf_counter() - begun


def copy(memory: DeviceMemory) -> float:
    """Seconds of a copy of as many bytes within the device."""
    begun = time.perf_counter()
    memory.blocks[:COUNT].copy_(memory.blocks[BLOCKS - COUNT :])
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    secret = secrets.token_hex(16)
    child = context.Process(target=serve, args=(theirs, secret), daemon=True)
    child.start()
    theirs.close()
    memory = pool(1)
    halves = cuda_ipc.sink_halves(cuda_ipc.open_ipc(memory, "ipc"), SINK_HALVES)
    try:
        with TransferSink(
            memory, FINGERPRINT, name="sink", secret=secret, transport="ipc", halves=halves
        ) as sink:
            fetch(sink, mine, 0), copy(memory)  # compiles, maps
            pairs = [(copy(memory), fetch(sink, mine, number)) for number in range(1, ROUNDS)]
    except EOFError:
        raise SystemExit("The source ended with an error (above).") from None
    finally:
        child.kill()
        child.join(timeout=5)
    expected = pool(7).blocks[:COUNT]
    same = bool(torch.equal(memory.blocks[BLOCKS - COUNT :], expected))
    speed = COUNT * BLOCK_NBYTES / statistics.median(taken for _, taken in pairs) / 1e9
    share = statistics.median(limit / taken for limit, taken in pairs)
    print(
        f"CUDA IPC: {speed:.0f} GB/s, {share:.0%} of a copy within the device, "
        f"blocks {'equal' if same else 'WRONG'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
