"""Orders to running workers: another role, and the way out, while streams go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import make_checkpoint
from live_cluster import PDSERVE, Cluster

pytestmark = pytest.mark.timeout(240)
OPTIONS = (
    "--prefill", 1, "--decode", 1, "--served-model-name", "m", "--dtype", "float32",
    "--kv-cache-memory", "32MiB",
)  # fmt: skip


def order(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PDSERVE, *words, "--pid", str(cluster.process.pid)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def roles(cluster: Cluster) -> dict[str, str]:
    return {record["worker_id"]: record["role"] for record in cluster.workers()}


class Stream(threading.Thread):
    """One streamed greedy answer."""

    def __init__(self, cluster: Cluster, max_tokens: int = 12) -> None:
        super().__init__(daemon=True)
        self._url = f"{cluster.url}/v1/completions"
        self._body: dict[str, Any] = {
            "model": "m", "prompt": list(range(10, 60)), "max_tokens": max_tokens, "stream": True,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        self.tokens: list[int] = []
        self.first = threading.Event()
        self.complete = False
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        self.tokens += choice.get("token_ids") or []
                self.first.set()
                self.complete |= line == "data: [DONE]"

    def end(self) -> list[int]:
        self.join(60)
        assert self.complete
        return self.tokens


def until(cluster: Cluster, worker_id: str, epoch: int) -> None:
    """The worker is ready in a later epoch."""
    deadline = time.monotonic() + 60
    while not any(
        (w["worker_id"], w["state"]) == (worker_id, "ready") and w["epoch"] > epoch
        for w in cluster.workers()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_roles_and_departures(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "nano", "llama", "nano")
    with Cluster("--model", folder, *OPTIONS) as cluster:
        right = Stream(cluster).end()

        done = order(cluster, "role", "prefill-0", "both")
        assert (done.returncode, done.stdout.strip()) == (0, "prefill-0 has the role both now.")
        assert roles(cluster) == {"prefill-0": "colocated", "decode-0": "decode"}
        before = cluster.worker("decode")
        os.kill(before["pid"], signal.SIGKILL)
        assert Stream(cluster).end() == right, "the other one does everything"
        until(cluster, "decode-0", before["epoch"])
        assert order(cluster, "role", "prefill-0", "prefill").returncode == 0
        assert roles(cluster) == {"prefill-0": "prefill", "decode-0": "decode"}
        cluster.until_serving()
        assert Stream(cluster).end() == right

        # A drained worker finishes its stream; what is new goes to the other one.
        assert order(cluster, "role", "prefill-0", "both").returncode == 0
        long = Stream(cluster, 1200)
        assert long.first.wait(30)
        leaving = subprocess.Popen(
            [PDSERVE, "drain", "decode-0", "--pid", str(cluster.process.pid)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert Stream(cluster).end() == right
        tokens = long.end()
        assert tokens[:12] == right and len(tokens) == 1200
        printed, _ = leaving.communicate(timeout=60)
        assert leaving.returncode == 0, printed
        assert printed.splitlines()[-1] == "decode-0 has finished and left."
        assert roles(cluster) == {"prefill-0": "colocated"}
        assert Stream(cluster).end() == right
        cluster.wait_until_clean()
        cluster.until_said("decode-0 has left as it was told to")

        refused = order(cluster, "drain", "decode-0")
        assert refused.returncode == 2
        assert "There is no worker 'decode-0' in this cluster; there: prefill-0." in refused.stderr
        refused = order(cluster, "role", "prefill-0", "boss")
        assert refused.returncode == 2 and "one of prefill, decode, both" in refused.stderr
        stranger = subprocess.run(
            [PDSERVE, "drain", "prefill-0", "--redis", "redis://127.0.0.1:1"],
            env={**os.environ, "PDSERVE_SECRET": ""}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert stranger.returncode == 2 and "PDSERVE_SECRET is not set" in stranger.stderr
