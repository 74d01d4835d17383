"""A topology by its name, and a cluster of that shape with an account of what it uses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.bench.arrivals import BenchError

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
PDSERVE = (sys.executable, "-P", "-m", "pdserve.cluster.main")
NAME = "bench"
_PART = re.compile(r"([1-9]\d?)([PDC])")
_WORKERS = ("pdserve.prefill_worker", "pdserve.decode_worker")
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """So many workers of each kind."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0

    @classmethod
    def parse(cls, text: str) -> Topology:
        """From "1P+1D", "2C", "2P+2D+1C". Raises BenchError."""
        counts = dict.fromkeys("PDC", 0)
        for part in text.upper().split("+"):
            match = _PART.fullmatch(part.strip())
            if match is None or counts[match[2]]:
                raise BenchError(
                    f"A topology is written like 1P+1D, 2C or 2P+2D+1C (P prefill, D decode, C "
                    f"colocated workers, each letter once), not {text!r}."
                )
            counts[match[2]] = int(match[1])
        if bool(counts["P"]) != bool(counts["D"]):
            raise BenchError(f"{text}: prefill and decode workers need each other.")
        return cls(prefill=counts["P"], decode=counts["D"], colocated=counts["C"])

    def __str__(self) -> str:
        counts = {"P": self.prefill, "D": self.decode, "C": self.colocated}
        return "+".join(f"{count}{letter}" for letter, count in counts.items() if count)

    @property
    def plain(self) -> str:
        """For people: "1 worker for prompts and 1 for answers (1P+1D)"."""
        counts = ((self.prefill, "for prompts"), (self.decode, "for answers"),
                  (self.colocated, "that does both"))  # fmt: skip
        parts = [f"{count:,} {what}" for count, what in counts if count]
        first = counts[0][0] or counts[2][0]
        parts[0] = parts[0].replace(" ", " worker " if first == 1 else " workers ", 1)
        text = " and ".join(parts)
        return f"{text if self.colocated == 1 else text.replace('does', 'do')} ({self})"

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.colocated

    def options(self, kv_total: int = 0) -> list[str]:
        """Of `pdserve up`. kv_total: bytes of KV cache that all workers share equally (0: each has
        what it takes by itself)."""
        counts = ("prefill", "decode", "colocated")
        words = [f"--{name}={getattr(self, name)}" for name in counts]
        memory = [f"--kv-cache-memory={kv_total // self.workers}"] if kv_total else []
        return [*words, *memory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a cluster has used so far."""

    cpu_s: Mapping[str, float]
    """Process → user and system seconds."""
    memory_mib: Mapping[str, float]
    """Process → most resident memory, in MiB. Workers share the pages of the weights."""
    moved_mib: float
    """KV bytes that arrived at workers, in MiB."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running `pdserve up`."""

    process: subprocess.Popen[str]
    url: str

    def workers(self) -> list[dict[str, Any]]:
        command = [*PDSERVE, "status", "--json", "--pid", str(self.process.pid)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: list[dict[str, Any]] = json.loads(text)["workers"]
        return found

    def moved_mib(self) -> float:
        """KV that has arrived at workers since the start, in MiB."""
        return sum(_bytes_in(worker) for worker in self.workers()) / 2**20

    def account(self) -> Account:
        names = {pid: _process_name(pid) for pid in _children(self.process.pid)}
        named = {pid: name for pid, name in names.items() if name}
        return Account(
            cpu_s={name: _cpu_s(pid) for pid, name in named.items()},
            memory_mib={name: _peak_mib(pid) for pid, name in named.items()},
            moved_mib=self.moved_mib(),
        )


@contextlib.contextmanager
def up(options: Sequence[str]) -> Iterator[Cluster]:
    """Start a cluster, wait until it is ready, stop it at the end. A topology is measured as it is
    named: prompts are always handed over, unless the options say otherwise. Raises BenchError."""
    words = ["--served-model-name", NAME, *options]
    if not any(word.startswith("--disaggregate") for word in words):
        words.append("--disaggregate=always")
    process = subprocess.Popen(
        [*PDSERVE, "up", "--port", "0", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Cluster(process, _ready_url(process))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    # Reading has no deadline of its own: whoever is not ready in time is ended from beside.
    late = threading.Timer(READY_TIMEOUT_S, process.kill)
    late.start()
    begun = time.monotonic()
    try:
        for line in process.stdout:
            if line.startswith("ready "):
                return line.split()[1]
    finally:
        late.cancel()
    raise BenchError(
        f"The cluster did not become ready (it ended after {time.monotonic() - begun:.0f} s); its "
        "messages are above."
    )


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(text) for task in tasks for text in task.read_text().split()]


def _process_name(pid: int) -> str:
    """The worker's id, "router" or "redis"; "" for what is none of these."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if "pdserve.router" in words:
        return "router"
    if any(module in words for module in _WORKERS):
        given = [word.partition("=")[2] for word in words if word.startswith("--worker-id=")]
        return given[0] if given else f"worker {pid}"
    return "redis" if "redis-server" in words[0] else ""


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _bytes_in(worker: Mapping[str, Any]) -> float:
    address = f"http://{worker['host']}:{worker['http_port']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("pdserve_worker_bytes_in")
    )
