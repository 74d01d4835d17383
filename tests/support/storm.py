"""Many streams through a cluster whose processes are killed, frozen and started again.

`Storm` draws what happens when from a seed; `Streams` runs the clients and compares every answer
with the one of the undisturbed cluster.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from live_cluster import Cluster

RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    usage: int
    """Completion tokens, as the server counts them."""


def request(kind: int, longest: int) -> dict[str, Any]:
    """Plain, seeded, and held to a form, over prompts of 5 to 200 tokens, some with a common
    prefix."""
    rng = random.Random(kind)
    shared = random.Random(99).choices(range(10, 500), k=64) if kind % 3 == 0 else []
    body: dict[str, Any] = {
        "model": "m",
        "prompt": [*shared, *rng.choices(range(10, 500), k=rng.randint(5, 136))],
        "max_tokens": rng.randint(longest // 2, longest),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if kind % 2:
        body |= {"temperature": 1.0, "seed": kind, "top_p": 0.95}
    if kind % 4 < 2:
        body |= {"ignore_eos": True}
    else:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 100}
        body |= {"structured_outputs": {"json": schema}}
    return body


@dataclass
class Streams:
    """The clients."""

    url: str
    kinds: int
    """Different requests."""
    longest: int
    """Tokens of the longest answer."""
    right: dict[int, Answer] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    done: int = 0
    refused: int = 0
    """Answers of 503 before anything was served: nobody was there; the client asks again."""
    gaps: list[float] = field(default_factory=list)
    """The longest pause within each stream, seconds."""

    async def learn(self) -> None:
        """The answers of the undisturbed cluster; each is asked for twice."""
        async with self._client() as client:
            for kind in range(self.kinds):
                self.right[kind] = await self._ask(client, kind)
            assert [await self._ask(client, kind) for kind in range(4)] == [
                self.right[kind] for kind in range(4)
            ]
        self.gaps.clear()

    async def run(self, count: int, at_once: int, seed: int) -> None:
        """`count` streams, `at_once` at any time."""
        kinds = random.Random(seed).choices(range(self.kinds), k=count)

        async def one() -> None:
            # Connections of one's own, so that both routers get some.
            async with self._client() as client:
                while kinds:
                    await self._judge(client, kinds.pop())

        await asyncio.gather(*(one() for _ in range(at_once)))

    async def _judge(self, client: httpx.AsyncClient, kind: int) -> None:
        while True:
            try:
                answer = await self._ask(client, kind)
            except Unserved:
                self.refused += 1
                await asyncio.sleep(RETRY_S)
                continue
            except (httpx.HTTPError, AssertionError) as error:
                self.wrong.append(f"kind {kind}: {error!r}")
                return
            self.done += 1
            if answer != self.right[kind]:
                self.wrong.append(f"kind {kind}: {answer}, not {self.right[kind]}")
            return

    async def _ask(self, client: httpx.AsyncClient, kind: int) -> Answer:
        text, tokens, finish, usage = "", [], "", -1
        longest, last = 0.0, time.monotonic()
        url = f"{self.url}/v1/completions"
        async with client.stream("POST", url, json=request(kind, self.longest)) as response:
            if response.status_code == 503:
                raise Unserved
            assert response.status_code == 200, (await response.aread()).decode()
            async for data in _data(response):
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                if data == "[DONE]":
                    self.gaps.append(longest)
                    return Answer(text, tuple(tokens), finish, usage)
                event = json.loads(data)
                assert "error" not in event, event
                usage = event["usage"]["completion_tokens"] if event.get("usage") else usage
                for choice in event["choices"]:
                    text += choice["text"]
                    tokens += choice.get("token_ids") or []
                    finish = choice["finish_reason"] or finish
        raise AssertionError("the stream ended without [DONE]")

    @staticmethod
    def _client() -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=120)


class Unserved(Exception):
    """503 instead of an answer."""


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@dataclass
class Storm:
    """What happens to a cluster, drawn from a seed."""

    cluster: Cluster
    seed: int
    pause_s: tuple[float, float] = (1.0, 3.0)
    """Between two events."""
    redis_at: tuple[int, ...] = (3, 8)
    """Events that are a restart of Redis."""
    happened: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled; nothing stays frozen."""
        rng, began = random.Random(self.seed), time.monotonic()
        number = 0
        while True:
            await asyncio.sleep(rng.uniform(*self.pause_s))
            number += 1
            if number in self.redis_at:
                what, victim = "redis", self._redis()
            else:
                what = rng.choice(["kill", "kill", "freeze"])
                victim = self._worker(rng)
            if victim is None:
                continue  # it is being started again
            self.happened[what] += 1
            self.log.append(f"{time.monotonic() - began:6.1f} s  {what} {_name(victim)}")
            try:
                if what == "freeze":
                    await self._freeze(victim, rng.choice([0.3, 1.5, 3.5]))
                else:
                    victim.kill()
            except psutil.NoSuchProcess:
                continue

    async def _freeze(self, victim: psutil.Process, seconds: float) -> None:
        victim.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            victim.send_signal(signal.SIGCONT)

    def _processes(self) -> list[psutil.Process]:
        return psutil.Process(self.cluster.process.pid).children()

    def _redis(self) -> psutil.Process | None:
        return next((p for p in self._processes() if "redis" in p.name()), None)

    def _worker(self, rng: random.Random) -> psutil.Process | None:
        workers = {_name(p): p for p in self._processes() if _name(p).startswith(("pre", "dec"))}
        role = rng.choice(["pre", "dec"])
        names = sorted(name for name in workers if name.startswith(role))
        return workers[rng.choice(names)] if names else None


def _name(process: psutil.Process) -> str:
    """Worker id, or what the process is called."""
    try:
        for word in process.cmdline():
            if word.startswith("--worker-id="):
                return word.partition("=")[2]
        return str(process.name())
    except psutil.Error:
        return ""


def report(streams: Streams, storm: Storm, took_s: float) -> str:
    """What a run was like, for people."""
    gaps = sorted(streams.gaps)
    lines = [
        f"{streams.done} streams in {took_s:.0f} s; {len(streams.wrong)} wrong; "
        f"{streams.refused} times nobody was there",
        "events: " + ", ".join(f"{n} × {what}" for what, n in sorted(storm.happened.items())),
        *storm.log,
    ]
    if gaps:
        p99 = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]
        lines.append(
            f"longest pause in a stream: median {statistics.median(gaps):.2f} s, p99 {p99:.2f} s, "
            f"worst {gaps[-1]:.2f} s"
        )
    return "\n".join(lines)


def half_closed(pids: list[int]) -> list[str]:
    """Sockets that their peer has closed and their owner has not."""
    return [
        f"{pid}: {connection.laddr} {connection.raddr}"
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_CLOSE_WAIT
    ]


def connections(pid: int, port: int) -> int:
    """Established ones to this port of the process."""
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        for connection in psutil.Process(pid).net_connections("tcp")
    )


def group_of(cluster: Cluster) -> list[psutil.Process]:
    """All processes of the cluster but the launcher."""
    return psutil.Process(cluster.process.pid).children(recursive=True)
