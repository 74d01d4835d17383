"""More requests than a cluster can serve, at a fixed rate, and what became of each."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field

import httpx

TOKENS = 24


@dataclass
class Outcome:
    """What clients saw. Times in seconds."""

    gaps: list[float] = field(default_factory=list)
    """Mean time between two tokens, per served request."""
    refused: list[float] = field(default_factory=list)
    """Times to a 429."""
    retry_after: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def gap(self) -> float:
        return statistics.median(self.gaps)


class Crowd:
    """Clients of one router; every answer must be complete, or a 429 with Retry-After."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = 0

    async def one(self, client: httpx.AsyncClient, outcome: Outcome) -> None:
        self._numbers += 1
        prompt = [10 + (self._numbers * 7 + i) % 400 for i in range(32)]
        body = {
            "model": "m", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
            "temperature": 0, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        began, first, last, tokens = time.monotonic(), 0.0, 0.0, 0
        try:
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
                if response.status_code == 429:
                    outcome.refused.append(time.monotonic() - began)
                    outcome.retry_after.append(int(response.headers["retry-after"]))
                    return
                if response.status_code != 200:
                    outcome.wrong.append((await response.aread()).decode())
                    return
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    for choice in event.get("choices", ()):
                        tokens += len(choice.get("token_ids") or ())
                    if tokens:
                        last = time.monotonic()
                        first = first or last
        except httpx.TransportError as error:
            outcome.wrong.append(repr(error))
            return
        if tokens != TOKENS:
            outcome.wrong.append(f"{tokens} tokens instead of {TOKENS}")
        else:
            outcome.gaps.append((last - first) / (TOKENS - 1))

    async def in_turn(self, count: int) -> Outcome:
        """One request after the other."""
        outcome = Outcome()
        async with _client() as client:
            for _ in range(count):
                await self.one(client, outcome)
        return outcome

    async def together(self, clients: int, seconds: float) -> Outcome:
        """So many clients, each of which asks again as soon as it has its answer."""
        outcome, end = Outcome(), time.monotonic() + seconds

        async def ask(client: httpx.AsyncClient) -> None:
            while time.monotonic() < end:
                before = len(outcome.refused)
                await self.one(client, outcome)
                if len(outcome.refused) > before:
                    await asyncio.sleep(0.02)

        async with _client() as client:
            await asyncio.gather(*(ask(client) for _ in range(clients)))
        return outcome

    async def arriving(self, rate: float, seconds: float) -> Outcome:
        """`rate` requests a second, whatever becomes of them."""
        outcome, began = Outcome(), time.monotonic()
        async with _client() as client, asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                group.create_task(self.one(client, outcome))
        return outcome


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=60, limits=limits, trust_env=False)
