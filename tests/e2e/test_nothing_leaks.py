"""Clients that leave and workers that are killed, at every moment: no block stays held.

The model is a 32M one with random weights, big enough for prompts to take seconds on one core, so
that there is time to leave in the middle of things.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from checkpoints import make_checkpoint
from live_cluster import Cluster, metrics

pytestmark = pytest.mark.timeout(240)

OPTIONS = (
    "--served-model-name", "m", "--load-format", "dummy", "--dtype", "float32",
    "--kv-cache-memory", "256MiB", "--max-num-batched-tokens", 128, "--max-num-seqs", 2,
    "--lease-s", 2,
)  # fmt: skip
TOPOLOGIES = {"disaggregated": ("--prefill", 1, "--decode", 1), "colocated": ("--colocated", 1)}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "mid", "llama", "mid")
    with Cluster("--model", folder, *OPTIONS, *TOPOLOGIES[request.param]) as cluster:
        yield cluster


def body(prompt_tokens: int, max_tokens: int, **more: object) -> dict[str, object]:
    return {
        "model": "m", "prompt": [5 + i % 1000 for i in range(prompt_tokens)], "stream": True,
        "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more,
    }  # fmt: skip


@contextlib.contextmanager
def stream(cluster: Cluster, request: dict[str, object]) -> Iterator[Iterator[str]]:
    """The data lines of a streamed completion; leaving the block closes the connection."""
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=request) as response,
    ):
        response.read() if response.status_code != 200 else None
        assert response.status_code == 200, response.text
        yield (line[6:] for line in response.iter_lines() if line.startswith("data: "))


def state(cluster: Cluster, key: str) -> float:
    return sum(metrics(w["host"], w["http_port"])[key] for w in cluster.workers())


def leave_after(cluster: Cluster, request: dict[str, object], delay_s: float) -> None:
    """Send a request and drop the connection after a while, whatever has come back by then."""
    with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=delay_s) as client:
        client.post(f"{cluster.url}/v1/completions", json=request)


def test_client_leaves_during_decode(cluster: Cluster) -> None:
    with stream(cluster, body(100, 500)) as lines:
        for _, _ in zip(range(4), lines, strict=False):
            pass
        assert state(cluster, "running") == 1
    cluster.wait_until_clean(1.0)


def test_client_leaves_during_prefill(cluster: Cluster) -> None:
    leave_after(cluster, body(3000, 10), 0.5)
    cluster.wait_until_clean(1.0)


def test_client_leaves_while_queued(cluster: Cluster) -> None:
    with contextlib.ExitStack() as others:
        for _ in range(2):
            lines = others.enter_context(stream(cluster, body(50, 2000)))
            next(lines)
            next(lines)
        leave_after(cluster, body(60, 10), 0.4)
    cluster.wait_until_clean(1.0)


def test_clients_leave_at_any_moment(cluster: Cluster) -> None:
    """A sweep over the whole life: admission, chunks, hand-over, transfer, first steps."""
    for tenth in range(24):
        leave_after(cluster, body(400 + tenth, 4, stream=False), 0.01 + tenth * 0.03)
    cluster.wait_until_clean(1.0)


def test_many_leave_at_once(cluster: Cluster) -> None:
    threads = [
        threading.Thread(target=leave_after, args=(cluster, body(200, 50), 0.2 + 0.02 * i))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.wait_until_clean(1.0)
    with stream(cluster, body(20, 3)) as lines:
        assert list(lines)[-1] == "[DONE]"


def test_a_request_past_its_deadline_ends_with_a_typed_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "mid", "llama", "mid")
    options = (*OPTIONS, *TOPOLOGIES["disaggregated"], "--request-timeout-s", 1)
    with Cluster("--model", folder, *options) as cluster:
        started = time.monotonic()
        answer = httpx.post(
            f"{cluster.url}/v1/completions", json=body(3500, 400, stream=False), timeout=30
        )
        assert time.monotonic() - started < 3
        assert answer.status_code == 504, answer.text
        assert "time" in answer.json()["error"]["message"]
        cluster.wait_until_clean(1.0)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_worker_leaves_nothing_behind(victim: str, tmp_path: Path) -> None:
    """The stream either goes on or ends with a typed error; the living free everything; the dead
    comes back with a new epoch, and the cluster serves again."""
    folder = make_checkpoint(tmp_path / "mid", "llama", "mid")
    with Cluster("--model", folder, *OPTIONS, *TOPOLOGIES["disaggregated"]) as cluster:
        before = cluster.worker(victim)
        prompt_tokens = 3000 if victim == "prefill" else 100
        ended = threading.Event()
        last: list[str] = []

        def read() -> None:
            request = body(prompt_tokens, 60)
            with httpx.Client(timeout=60) as client:
                with client.stream(
                    "POST", f"{cluster.url}/v1/completions", json=request
                ) as response:
                    last.extend(line for line in response.iter_lines() if line)
            ended.set()

        reader = threading.Thread(target=read)
        reader.start()
        deadline = time.monotonic() + 20
        while not metrics(before["host"], before["http_port"])["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(before["pid"], signal.SIGKILL)
        assert ended.wait(40), "the request hangs"
        reader.join()
        tail = last[-1].removeprefix("data: ")
        if tail != "[DONE]":
            assert json.loads(tail)["error"]["code"] in (500, 503), tail
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(StopIteration):
                after = cluster.worker(victim)
                if after["epoch"] > before["epoch"] and after["state"] == "ready":
                    break
            assert time.monotonic() < deadline, "the worker was not started again"
            time.sleep(0.1)
        cluster.wait_until_clean(3.0)
        cluster.until_serving()
        with stream(cluster, body(20, 3)) as lines:
            assert list(lines)[-1] == "[DONE]"
        cluster.wait_until_clean(1.0)
