"""A real cluster for tests: `pdserve up` in a process group of its own, on free ports.

Four duties: free ports, readiness that notices a dead child, logs shown only on failure, and the
end of the whole group.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

READY_TIMEOUT_S = 90.0
PDSERVE = str(Path(sys.executable).with_name("pdserve"))


class Cluster:
    """`with Cluster("--prefill", "2", ...) as cluster:` — ready when entered, gone when left.

    The folder of the log files is kept, and its files printed, only when something failed.
    """

    def __init__(self, *options: object, env: dict[str, str] | None = None) -> None:
        self.options = [str(option) for option in options]
        if "--disaggregate" not in self.options:
            # Which way a prompt goes shall not depend on how long things took.
            self.options += ["--disaggregate", "always"]
        self.env = env or {}
        self.log_dir = Path(tempfile.mkdtemp(prefix="pdserve-test-"))
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._said = threading.Condition()

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [PDSERVE, "up", "--port", "0", "--log-dir", str(self.log_dir), *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **self.env},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(READY_TIMEOUT_S) or not self.url:
            self.stop()
            raise AssertionError(f"The cluster did not become ready:\n{self.report()}")
        self.ready_after_s = time.monotonic() - self.started
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line.rstrip())
                self._said.notify_all()
            if line.startswith("ready "):
                self.url = line.split()[1]
                self._ready.set()
        self._ready.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        code = self.stop()
        if error is not None:
            print(self.report())
        elif code != 0:
            raise AssertionError(f"`pdserve up` ended with {code}:\n{self.report()}")
        else:
            shutil.rmtree(self.log_dir)

    def stop(self) -> int | None:
        """SIGTERM, then wait; SIGKILL for the whole group if that takes over 10 s."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode

    def report(self) -> str:
        logs = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.log_dir.glob("*.log"))
        ]
        return "\n".join([*self.lines, *logs])

    def workers(self) -> list[dict[str, Any]]:
        """The records of all live workers."""
        done = subprocess.run(
            [PDSERVE, "status", "--json", "--pid", str(self.process.pid)],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        records: list[dict[str, Any]] = json.loads(done.stdout)["workers"]
        return records

    def worker(self, role: str) -> dict[str, Any]:
        return next(record for record in self.workers() if record["role"] == role)

    def until_routed(self, role: str, within_s: float = 10.0) -> dict[str, Any]:
        """The worker's record, once it says from whom it has fetched, and how much: it is renewed
        a little after, and the two are not of the same moment."""
        deadline = time.monotonic() + within_s
        while not (record := self.worker(role))["routes"] or not record["status"]["bytes_in"]:
            assert time.monotonic() < deadline, f"the {role} worker has fetched nothing: {record}"
            time.sleep(0.05)
        return record

    def until_serving(self, within_s: float = 10.0) -> None:
        """The router has somebody to send requests to. It looks at Redis four times a second, so it
        learns of a worker that is ready a little after everybody else who looks."""
        deadline = time.monotonic() + within_s
        while not self._serves():
            assert time.monotonic() < deadline, f"the router serves nobody after {within_s} s"
            time.sleep(0.02)

    def _serves(self) -> bool:
        with contextlib.suppress(httpx.TransportError):  # a router that is being started again
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def until_said(self, text: str, within_s: float = 10.0) -> None:
        """Wait until a line of the launcher holds `text`."""
        with self._said:
            said = self._said.wait_for(lambda: any(text in line for line in self.lines), within_s)
        assert said, f"The launcher never said {text!r}."

    def wait_until_clean(self, within_s: float = 1.0) -> None:
        """Every worker idle, all its blocks free or evictable; at the latest after `within_s`."""
        deadline = time.monotonic() + within_s
        addresses = [(w["worker_id"], w["host"], w["http_port"]) for w in self.workers()]
        while True:
            states = {name: metrics(host, port) for name, host, port in addresses}
            dirty = {name: state for name, state in states.items() if not is_clean(state)}
            if not dirty:
                return
            assert time.monotonic() < deadline, f"blocks are held after {within_s} s: {dirty}"
            time.sleep(0.02)


def metrics(host: str, port: int) -> dict[str, float]:
    """A worker's /metrics as {name without prefix: value}."""
    text = httpx.get(f"http://{host}:{port}/metrics", timeout=5).text
    found = {}
    for line in text.splitlines():
        if line.startswith("pdserve_worker_"):
            name, _, rest = line.removeprefix("pdserve_worker_").partition("{")
            found[name.removesuffix("_total") if name != "blocks_total" else name] = float(
                rest.rpartition(" ")[2]
            )
    return found


def is_clean(state: dict[str, float]) -> bool:
    busy = state["running"] + state["waiting"] + state["fetching"] + state["blocks_held"]
    return not busy and state["blocks_free"] + state["blocks_cached"] == state["blocks_total"]


@contextlib.contextmanager
def cluster_of(model: Path, *options: object) -> Iterator[Cluster]:
    with Cluster("--model", model, *options) as cluster:
        yield cluster
