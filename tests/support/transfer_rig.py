"""A source and a sink over real sockets, for the tests of the transfer."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport

BLOCK_NBYTES = 3000  # no power of two, no multiple of a page
POISON = 0xA5
PATIENCE_S = 10.0


FINGERPRINT = LayoutFingerprint(
    model="m",
    weights="w",
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    block_size=16,
)


@dataclass
class Reports:
    """Collects what `done` was called with."""

    got: list[FetchReport] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def done(self, report: FetchReport) -> None:
        with self.changed:
            self.got.append(report)
            self.changed.notify_all()

    def wait(self, count: int = 1, timeout_s: float = PATIENCE_S) -> list[FetchReport]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= count, timeout_s), self.got
            return list(self.got)

    def only(self, timeout_s: float = PATIENCE_S) -> FetchReport:
        (report,) = self.wait(1, timeout_s)
        return report


@dataclass
class Returned:
    """Collects what the source's `on_returned` was called with."""

    got: list[tuple[str, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, ticket: KVTicket, ending: str) -> None:
        with self.changed:
            self.got.append((ticket.request_id, ending))
            self.changed.notify_all()

    def wait(self, count: int = 1, timeout_s: float = PATIENCE_S) -> list[tuple[str, str]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= count, timeout_s), self.got
            return list(self.got)


def scramble(memory: HostMemory, seed: int = 0) -> None:
    generator = random.Random(seed)
    for block in range(memory.num_blocks):
        memory.view(block)[:] = generator.randbytes(memory.block_nbytes)


def poison(memory: HostMemory) -> None:
    for block in range(memory.num_blocks):
        memory.view(block)[:] = bytes([POISON]) * memory.block_nbytes


def is_poison(memory: HostMemory, block: int) -> bool:
    return bytes(memory.view(block)) == bytes([POISON]) * memory.block_nbytes


class Rig:
    """Builds sources, sinks and pools for one test, and takes them down after it."""

    def __init__(self) -> None:
        self.fingerprint = FINGERPRINT
        self.secret = "a secret"
        self.returned = Returned()
        self._closers: list[Callable[[], None]] = []

    def memory(self, num_blocks: int = 64, block_nbytes: int = BLOCK_NBYTES) -> HostMemory:
        memory = HostMemory(num_blocks, block_nbytes)
        self._closers.append(memory.close)
        return memory

    def source(self, memory: HostMemory | None = None, **changes: Any) -> TransferSource:
        if memory is None:
            memory = self.memory()
            scramble(memory)
        options: dict[str, Any] = {
            "worker_id": "prefill-0",
            "epoch": 7,
            "host": "127.0.0.1",
            "secret": self.secret,
            "transports": ("shm", "tcp"),
            "on_returned": self.returned,
        }
        fingerprint = changes.pop("fingerprint", self.fingerprint)
        source = TransferSource(memory, fingerprint, **{**options, **changes})
        self._closers.append(source.close)
        return source

    def sink(self, memory: HostMemory | None = None, **changes: Any) -> TransferSink:
        if memory is None:
            memory = self.memory()
            poison(memory)
        options: dict[str, Any] = {"name": "decode-0", "secret": self.secret, "threads": 2}
        fingerprint = changes.pop("fingerprint", self.fingerprint)
        sink = TransferSink(memory, fingerprint, **{**options, **changes})
        self._closers.append(sink.close)
        return sink

    def ticket(self, source: TransferSource, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        """Offer whole blocks of 16 tokens."""
        hashes = [bytes([index % 256]) * 16 for index in range(len(block_ids))]
        return source.offer(request_id, block_ids, 16 * len(block_ids), hashes)

    def fetch(
        self,
        sink: TransferSink,
        ticket: KVTicket,
        wanted: Sequence[int],
        targets: Sequence[int],
        within_s: float = PATIENCE_S,
    ) -> Reports:
        reports = Reports()
        sink.fetch(ticket, wanted, targets, time.monotonic() + within_s, reports.done)
        return reports

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


def open_sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:  # the listing's own descriptor
            continue
    return {entry for entry in found if "socket:" in entry}


def pools_held() -> tuple[int, int]:
    """(mappings, descriptors) of pools in this process, its own included."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        mapped = sum("memfd:pdserve" in line for line in file)
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = sum("memfd:pdserve" in os.readlink(name) for name in names if os.path.islink(name))
    return mapped, opened


def transfer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
