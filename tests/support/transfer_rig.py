"""A source and a sink over real sockets, for the tests of the transfer."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from fake_ipc import FakeDriver
from fake_nccl import FakeNccl

from pdserve.kv_transfer import cuda_ipc, nccl
from pdserve.kv_transfer.device import DeviceMemory
from pdserve.kv_transfer.line import Line
from pdserve.kv_transfer.memory import HostMemory, Spans
from pdserve.kv_transfer.nccl_owner import Owner
from pdserve.kv_transfer.sink import TransferSink
from pdserve.kv_transfer.source import TransferSource
from pdserve.kv_transfer.transports import SINK_HALVES, SOURCE_HALVES, Arriving, ShmSink, SinkHalf
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchHeader, FetchReport

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
    generator = np.random.default_rng(seed)
    for block in range(memory.num_blocks):
        memory.view(block)[:] = generator.bytes(memory.block_nbytes)


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
        self.between_devices = False
        """Whether pools count as memory of devices, with CUDA IPC and NCCL over stand-ins."""
        self._driver, self._nccl = FakeDriver(), FakeNccl()
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
        if self.between_devices:
            halves = nccl.source_halves(self._owner(), SOURCE_HALVES)
            if memory.block_nbytes % cuda_ipc.WORD == 0:
                halves = cuda_ipc.source_halves(self._driver.runtime(), halves)
            options["halves"] = halves
            options["transports"] = tuple(name for name in halves if name != "shm")
        fingerprint = changes.pop("fingerprint", self.fingerprint)
        source = TransferSource(self._seen(memory), fingerprint, **{**options, **changes})
        self._closers.append(source.close)
        return source

    def sink(self, memory: HostMemory | None = None, **changes: Any) -> TransferSink:
        if memory is None:
            memory = self.memory()
            poison(memory)
        options: dict[str, Any] = {"name": "decode-0", "secret": self.secret, "threads": 2}
        if self.between_devices:
            runtime, nbytes = self._driver.runtime(), memory.block_nbytes
            others = nccl.sink_halves(self._owner(), SINK_HALVES)
            fits = nbytes % cuda_ipc.WORD == 0
            options["halves"] = cuda_ipc.sink_halves(runtime if fits else None, others)
        fingerprint = changes.pop("fingerprint", self.fingerprint)
        sink = TransferSink(self._seen(memory), fingerprint, **{**options, **changes})
        self._closers.append(sink.close)
        return sink

    def _seen(self, memory: Any) -> Any:
        """The memory as a worker sees it."""
        if not self.between_devices:
            return memory
        blocks = torch.from_numpy(Spans(memory).span(0, memory.num_blocks)).view(
            memory.num_blocks, memory.block_nbytes
        )
        return DeviceMemory(blocks)

    def _owner(self) -> Owner:
        owner = Owner(self._nccl, self._nccl.streams)
        self._closers.append(owner.close)
        return owner

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

    def child(self, transports: str, num_blocks: int, block_nbytes: int) -> Child:
        child = Child(transports, num_blocks, block_nbytes)
        self._closers.append(child.close)
        return child

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


class Gate:
    """Holds every transfer over the wrapped transport after its first blocks, until opened. Out of
    shared memory `copied_bytes` are copied at once, but at least one block."""

    def __init__(self, name: str, copied_bytes: int = 1) -> None:
        self.name, self.copied_bytes = name, copied_bytes
        self.reached, self.opened = threading.Event(), threading.Event()

    def halves(self) -> dict[str, Callable[[Spans], SinkHalf]]:
        def make(pool: Spans) -> SinkHalf:
            if self.name == "shm":
                return ShmSink(pool, self.copied_bytes)
            return SINK_HALVES[self.name](pool)

        return {self.name: lambda pool: _Gated(make(pool), self)}


class _Gated:
    def __init__(self, inner: SinkHalf, gate: Gate) -> None:
        self.borrows = inner.borrows
        self._inner, self._gate = inner, gate

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Callable[[], float]
    ) -> Arriving:
        for sums in self._inner.receive(line, header, targets, wait):
            yield sums
            self._gate.reached.set()
            assert self._gate.opened.wait(PATIENCE_S)


class Flipping:
    """A sink's half that flips a bit of one target block, as often as it is told."""

    def __init__(self, name: str, target: int, times: int) -> None:
        self.name, self.target, self.times = name, target, times

    def __call__(self, pool: Spans) -> SinkHalf:
        self._pool, self._inner = pool, SINK_HALVES[self.name](pool)
        self.borrows = self._inner.borrows
        return self

    def receive(
        self, line: Line, header: FetchHeader, targets: Sequence[int], wait: Callable[[], float]
    ) -> Arriving:
        before = 0
        for sums in self._inner.receive(line, header, targets, wait):
            part = targets[before : before + len(sums)]
            before += len(sums)
            if self.target in part and self.times:
                self.times -= 1
                self._pool.span(self.target)[-1] ^= 0x10
                sums = self._pool.digests(part)
            yield sums


class Child:
    """A source in a process of its own (transfer_source.py)."""

    def __init__(self, transports: str, num_blocks: int, block_nbytes: int) -> None:
        script = pathlib.Path(__file__).with_name("transfer_source.py")
        path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
        options = ["1", "a secret", transports, str(num_blocks), str(block_nbytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def ticket(self, request_id: str, blocks: int) -> KVTicket:
        assert self._process.stdin is not None and self._process.stdout is not None
        print("offer", request_id, blocks, file=self._process.stdin, flush=True)
        return msgspec.json.decode(self._process.stdout.readline(), type=KVTicket)

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
