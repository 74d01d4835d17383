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
from collections.abc import AsyncIterator, Callable
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
    cut: int = 0
    """Streams whose router was killed; the client asks again."""
    excused: Callable[[], bool] = lambda: False
    """Whether a router has just been killed."""
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

    async def run(
        self, count: int, at_once: int, seed: int, enough: Callable[[], bool] = lambda: True
    ) -> None:
        """At least `count` streams, `at_once` at any time, until it is `enough`."""
        rng = random.Random(seed)
        kinds = rng.choices(range(self.kinds), k=count)

        async def one() -> None:
            # Connections of one's own, so that both routers get some.
            async with self._client() as client:
                while kinds or not enough():
                    kind = kinds.pop() if kinds else rng.randrange(self.kinds)
                    await self._judge(client, kind)

        await asyncio.gather(*(one() for _ in range(at_once)))

    async def _judge(self, client: httpx.AsyncClient, kind: int) -> None:
        while True:
            try:
                answer = await self._ask(client, kind)
            except Unserved:
                self.refused += 1
                await asyncio.sleep(RETRY_S)
                continue
            except httpx.TransportError as error:
                if self.excused():
                    self.cut += 1
                    continue
                self.wrong.append(f"kind {kind}: {error!r}")
                return
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
    router_at: tuple[int, ...] = (5, 15, 30)
    """Events that are the death of a router."""
    most: int = 10**6
    """Events, after which it is calm: they come by the clock, however slow the machine is."""
    router_killed_at: float = 0.0
    number: int = 0
    """Of the last event."""
    happened: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled or calm; nothing stays frozen."""
        rng, began = random.Random(self.seed), time.monotonic()
        while self.number < self.most:
            await asyncio.sleep(rng.uniform(*self.pause_s))
            self.number += 1
            if self.number in self.redis_at:
                what, victim = "redis", self._redis()
            elif self.number in self.router_at:
                what, victim = "router", self._router(rng)
                self.router_killed_at = time.monotonic()
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

    def _router(self, rng: random.Random) -> psutil.Process | None:
        routers = [p for p in self._processes() if "pdserve.router" in _words(p)]
        return rng.choice(routers) if routers else None

    def passed(self) -> bool:
        """Everything that had to happen has happened."""
        return self.number >= min(self.most, 1 + max(self.redis_at + self.router_at))

    def router_just_killed(self) -> bool:
        """Within the time that its clients need to notice."""
        return time.monotonic() - self.router_killed_at < 2.0

    def _worker(self, rng: random.Random) -> psutil.Process | None:
        workers = {_name(p): p for p in self._processes() if _name(p).startswith(("pre", "dec"))}
        role = rng.choice(["pre", "dec"])
        names = sorted(name for name in workers if name.startswith(role))
        return workers[rng.choice(names)] if names else None


def _name(process: psutil.Process) -> str:
    """Worker id, or what the process is called."""
    words = _words(process)
    for word in words:
        if word.startswith("--worker-id="):
            return word.partition("=")[2]
    return "router" if "pdserve.router" in words else "redis"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def report(streams: Streams, storm: Storm, took_s: float) -> str:
    """What a run was like, for people."""
    gaps = sorted(streams.gaps)
    lines = [
        f"{streams.done} streams in {took_s:.0f} s; {len(streams.wrong)} wrong; "
        f"{streams.cut} cut by the death of their router; {streams.refused} times nobody was there",
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
