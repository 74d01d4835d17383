"""Several routers at one port: both serve, and one that is killed leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time

import httpx
import pytest
from live_cluster import Cluster

pytestmark = pytest.mark.timeout(240)
HEADER = "x-pdserve-router"


def router_pid(cluster: Cluster) -> int:
    """Of the router that answers a new connection."""
    return int(httpx.get(f"{cluster.url}/health", timeout=10).headers[HEADER])


def seen(cluster: Cluster, count: int, without: int = 0) -> set[int]:
    """The routers that answer, once there are `count` of them."""
    pids: set[int] = set()
    deadline = time.monotonic() + 60
    while len(pids) < count:
        assert time.monotonic() < deadline, f"only {pids} answer"
        with contextlib.suppress(httpx.TransportError, KeyError):
            pids |= {router_pid(cluster)} - {without}
        time.sleep(0.01)
    return pids


class Stream(threading.Thread):
    """One long streamed answer over a connection of its own."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._url = cluster.url
        self.pid = 0
        self.first = threading.Event()
        self.text = ""
        self.complete = False

    def run(self) -> None:
        body = {
            "model": "demo", "prompt": "Once", "stream": True, "max_tokens": 900,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        with httpx.Client(base_url=self._url, timeout=60) as client:
            # The connection stays, so whoever answers here also streams.
            self.pid = int(client.get("/health").headers[HEADER])
            with (
                contextlib.suppress(httpx.TransportError),
                client.stream("POST", "/v1/completions", json=body) as answer,
            ):
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.text += json.loads(line[6:])["choices"][0]["text"]
                    self.complete |= line == "data: [DONE]"
                    self.first.set()


def test_a_router_is_killed() -> None:
    with Cluster("--routers", 2, "--prefill", 1, "--decode", 1,
                 "--served-model-name", "demo") as cluster:  # fmt: skip
        before = seen(cluster, 2)
        streams: list[Stream] = []
        while {stream.pid for stream in streams} != before:
            assert len(streams) < 40
            streams.append(Stream(cluster))
            streams[-1].start()
            assert streams[-1].first.wait(60)
        victim = streams[-1].pid
        os.kill(victim, signal.SIGKILL)
        for stream in streams:
            stream.join(60)
            assert stream.complete == (stream.pid != victim)
        cluster.wait_until_clean(1.0)
        after = seen(cluster, 2, without=victim)
        assert len(after & before) == 1, "a new one took the place of the dead one"
        last = Stream(cluster)
        last.start()
        last.join(60)
        assert last.complete
        texts = {stream.text for stream in [*streams, last] if stream.complete}
        assert len(texts) == 1 and all(last.text.startswith(s.text) for s in streams)
