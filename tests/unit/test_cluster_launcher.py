"""`pdserve up` around fake workers: start, death, restart, stop, and nothing left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_cluster
import psutil
import pytest

DEADLINE_S = 20.0


class Up:
    """A running `pdserve up` and the lines that it has printed."""

    def __init__(self, folder: Path, *options: str, modes: str = "") -> None:
        self.folder = folder
        self.lines: list[str] = []
        self._fresh: queue.Queue[str | None] = queue.Queue()
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"architectures": ["Fake"]}')
        for name in ("tmp", "run"):
            (folder / name).mkdir(exist_ok=True)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PDSERVE_")},
            "TMPDIR": str(folder / "tmp"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "FAKE_MODES": modes,
        }
        given = ["--model", str(model), "--load-format", "dummy", *options]
        if "--port" not in options:
            given += ["--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", fake_cluster.__file__, "up", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._fresh.put(line.rstrip())
        self._fresh.put(None)

    def until(self, words: str) -> str:
        """The next line that holds `words`."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            line = self._fresh.get(timeout=max(0.01, deadline - time.monotonic()))
            assert line is not None, f"ended before {words!r}:\n" + "\n".join(self.lines)
            self.lines.append(line)
            if words in line:
                return line

    def end(self) -> tuple[int, str]:
        """(exit code, everything it printed)."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        while (line := self._fresh.get(timeout=DEADLINE_S)) is not None:
            self.lines.append(line)
        return code, "\n".join(self.lines)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pdserve.cluster.main", "status", "--json"],
            env=self.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def workers(self) -> dict[str, dict[str, Any]]:
        return {record["worker_id"]: record for record in self.status()["workers"]}

    def leftovers(self) -> list[str]:
        return [
            str(path) for name in ("tmp", "run") for path in (self.folder / name).rglob("*.*")
        ] + [str(path) for path in (self.folder / "tmp").iterdir()]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(folder: Path, *options: str, modes: str = "") -> Iterator[Up]:
    up = Up(folder, *options, modes=modes)
    try:
        yield up
    finally:
        up.close()


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=5)
    return not alive


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Shorter than pytest's: a launcher whose folder's path is too long for sockets goes elsewhere,
    where these tests do not look."""
    with tempfile.TemporaryDirectory(prefix="up-") as folder:
        yield Path(folder)


def test_from_nothing_to_ready_and_back_to_nothing(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with running(tmp_path, "--prefill", "2", "--decode", "1", "--log-dir", str(logs)) as up:
        line = up.until("ready http")
        assert line.startswith("ready http://127.0.0.1:")
        status = up.status()
        assert status["url"] == line.removeprefix("ready ")
        assert sorted(up.workers()) == ["decode-0", "prefill-0", "prefill-1"]
        processes = up.descendants()
        assert len(processes) == 5, "3 workers, router, Redis"
        secret_words = [word for p in processes for word in p.cmdline() if "secret" in word.lower()]
        assert not secret_words
        up.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        code, text = up.end()
        assert code == 0, text
        assert time.monotonic() - asked < 5
        assert sum(line.startswith("ready ") for line in up.lines) == 1
        assert all_gone(processes)
        assert not up.leftovers()
    names = {path.name for path in logs.iterdir()}
    assert names == {"decode-0.log", "prefill-0.log", "prefill-1.log", "redis.log", "router.log"}


def test_ctrl_c_before_it_is_ready(tmp_path: Path) -> None:
    with running(tmp_path, modes="decode-0=mute") as up:
        up.until("decode-0: loading weights")
        processes = up.descendants()
        up.process.send_signal(signal.SIGINT)
        code, text = up.end()
        assert code == 0, text
        assert "ready http" not in text
        assert all_gone(processes)
        assert not up.leftovers()


def test_a_frozen_worker_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        up.until("ready http")
        before = up.workers()["decode-0"]
        psutil.Process(before["pid"]).suspend()
        up.until("decode-0 has not renewed its lease for 5 s")
        up.until("decode-0 died (killed by SIGKILL)")
        up.until("decode-0 is back.")
        assert up.workers()["decode-0"]["epoch"] > before["epoch"]
        up.process.terminate()
        assert up.end()[0] == 0


def test_a_worker_that_was_told_to_leave_is_not_started_again(tmp_path: Path) -> None:
    with running(tmp_path, "--decode", "2") as up:
        up.until("ready http")
        processes = {name: record["pid"] for name, record in up.workers().items()}
        psutil.Process(processes["decode-0"]).terminate()  # the fake one ends with 0
        up.until("decode-0 has left as it was told to")
        psutil.Process(processes["decode-1"]).kill()  # others are still looked after
        up.until("decode-1 is back.")
        assert sorted(up.workers()) == ["decode-1", "prefill-0"]
        up.process.terminate()
        assert up.end()[0] == 0


@pytest.mark.parametrize("name", ["decode-0", "router", "redis"])
def test_what_dies_is_reported_and_started_again(tmp_path: Path, name: str) -> None:
    with running(tmp_path) as up:
        url = up.until("ready http").removeprefix("ready ")
        before = up.workers()
        victim = next(
            process
            for process in up.descendants()
            if name in " ".join(process.cmdline()[1:]) or name in process.name()
        )
        victim.kill()
        up.until(f"{name} died (killed by SIGKILL); starting it again in 0.1 s")
        up.until(f"{name} is back.")
        deadline = time.monotonic() + DEADLINE_S
        while len(after := up.workers()) < 2:  # workers publish themselves to the new Redis
            assert time.monotonic() < deadline
        for worker_id, record in after.items():
            if worker_id == name:
                assert record["epoch"] > before[worker_id]["epoch"]
                assert record["pid"] != before[worker_id]["pid"]
            else:
                assert record == before[worker_id]
        assert up.status()["url"] == url
        up.process.terminate()
        assert up.end()[0] == 0
        assert not up.leftovers()


def test_the_stubborn_are_killed_with_their_children(tmp_path: Path) -> None:
    with running(tmp_path, modes="decode-0=stubborn,router=stubborn") as up:
        up.until("ready http")
        processes = up.descendants()
        assert sum("grandchild" in process.cmdline() for process in processes) == 2
        up.process.terminate()
        asked = time.monotonic()
        code, text = up.end()
        assert code == 0, text
        assert time.monotonic() - asked < 5
        assert all_gone(processes)
        assert not up.leftovers()


def test_a_killed_launcher_takes_its_processes_along(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        up.until("ready http")
        processes = up.descendants()
        up.process.kill()
        assert all_gone(processes)
        assert up.leftovers(), "nobody was there to clean up"
    with running(tmp_path) as up:
        up.until("ready http")
        assert len(list((tmp_path / "tmp").iterdir())) == 1, "the next one did"
        up.process.terminate()
        assert up.end()[0] == 0
        assert not up.leftovers()


def test_a_worker_that_cannot_start_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, modes="decode-0=crash") as up:
        code, text = up.end()
        assert code == 1
        assert text.count("decode-0 died (exit status 1); starting it again") == 4
        assert "error: decode-0 died 5 times before it was ready (exit status 1)" in text
        assert "decode-0: these are the last words" in text.splitlines()[-1]
        assert not up.leftovers()


def test_a_configuration_error_of_a_worker_is_passed_on(tmp_path: Path) -> None:
    with running(tmp_path, modes="prefill-0=usage") as up:
        code, text = up.end()
        assert code == 2
        sentence = "prefill-0: error: The weights are too heavy; give a lighter --model."
        assert text.splitlines()[-1] == f"pdserve up: error: {sentence}"
        assert not up.leftovers()


def test_a_cluster_that_does_not_get_ready_in_time(tmp_path: Path) -> None:
    with running(tmp_path, "--start-timeout-s", "1", modes="prefill-0=mute") as up:
        code, text = up.end()
        assert code == 1
        assert "was not ready within 1 s; still waiting for prefill-0" in text
        assert not up.leftovers()


def test_bad_surroundings_are_named_before_anything_starts(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    plain_file = tmp_path / "file"
    plain_file.touch()
    cases = [
        (["--port", str(port)], f"Port {port} on 127.0.0.1 is in use"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is not an address of this machine"),
        (["--redis", "redis://127.0.0.1:1"], "Redis at redis://127.0.0.1:1 does not answer"),
        (["--redis", "http://x"], "cannot be used"),
        (["--model", str(tmp_path / "none")], "none does not exist"),
        (["--model", str(tmp_path)], "holds no model: config.json is missing"),
        (["--load-format", "auto"], "holds no *.safetensors"),
        (["--log-dir", str(plain_file / "logs")], "cannot be written"),
    ]
    with listener:
        for options, words in cases:
            with running(tmp_path, *options) as up:
                code, text = up.end()
                assert (code, words in text) == (2, True), text
                assert not up.leftovers()


def test_two_launchers_for_one_port(tmp_path: Path) -> None:
    """At the same time, long before either of them listens."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = ("--port", port)
    with (
        running(first, *options, modes="decode-0=mute") as one,
        running(second, *options, modes="decode-0=mute") as other,
    ):
        deadline = time.monotonic() + DEADLINE_S
        while one.process.poll() is other.process.poll() is None:
            assert time.monotonic() < deadline, "both think that the port is theirs"
            time.sleep(0.01)
        loser = one if one.process.poll() is not None else other
        winner = other if loser is one else one
        code, text = loser.end()
        assert (code, f"Port {port} on 127.0.0.1 is in use" in text) == (2, True), text
        winner.process.terminate()
        assert winner.end()[0] == 0


def test_ctrl_c_before_the_command_has_begun() -> None:
    """No traceback; and what comes before `main` is too short for one."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from pdserve.cluster import main\n"
        "heavy = {'argparse', 'asyncio', 'yaml', 'msgspec'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # not so behind a shell's &
        "main._HERE['up'] = lambda options: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main.main(['up']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_status_without_a_cluster(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pdserve.cluster.main", "status"],
        env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "No cluster runs on this machine" in done.stderr


def test_status_as_a_table(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        up.until("ready http")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pdserve.cluster.main", "status"],
            env=up.env, capture_output=True, text=True, timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        title, headings, *rows = done.stdout.splitlines()
        assert title.startswith("cluster pdserve at http://127.0.0.1:")
        assert headings.split()[:5] == ["WORKER", "ROLE", "STATE", "EPOCH", "PID"]
        assert [row.split()[:3] for row in rows] == [
            ["decode-0", "decode", "ready"],
            ["prefill-0", "prefill", "ready"],
        ]
        up.process.terminate()
        assert up.end()[0] == 0
