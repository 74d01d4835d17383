"""Clients that keep a cluster busy, check every answer, and may leave in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx

PROMPTS = 24
NEW_TOKENS = 10


def prompt(number: int) -> list[int]:
    """Of 5 to 150 tokens; every third shares a prefix with the others of its kind."""
    rng = random.Random(number)
    shared = random.Random(99).choices(range(10, 500), k=48) if number % 3 == 0 else []
    return [*shared, *rng.choices(range(10, 500), k=rng.randint(5, 100))]


@dataclass
class Load:
    """Greedy streamed completions against one router; `answers` are the right ones."""

    url: str
    answers: dict[int, list[int]] = field(default_factory=dict)
    finished: list[float] = field(default_factory=list)
    """When (time.monotonic) right answers were complete."""
    left: int = 0
    failed: list[str] = field(default_factory=list)
    """Typed errors."""

    async def learn(self) -> None:
        """Ask for every answer once, undisturbed."""
        async with self._client() as client:
            for number in range(PROMPTS):
                self.answers[number] = await self._ask(client, number)

    async def run(self, clients: int, seconds: float, leaving: float = 0.0, seed: int = 0) -> None:
        """Keep `clients` requests going; the share `leaving` of them is dropped in the middle.
        Raises AssertionError for a wrong answer or an error that is not typed."""
        end = time.monotonic() + seconds
        async with self._client() as client:
            await asyncio.gather(
                *(self._one(client, end, leaving, random.Random(seed + n)) for n in range(clients))
            )

    async def _one(
        self, client: httpx.AsyncClient, end: float, leaving: float, rng: random.Random
    ) -> None:
        while time.monotonic() < end:
            number = rng.randrange(PROMPTS)
            if rng.random() < leaving:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.15):
                        await self._try(client, number)
                self.left += 1
            elif await self._try(client, number):
                self.finished.append(time.monotonic())

    async def _try(self, client: httpx.AsyncClient, number: int) -> bool:
        """Whether the answer came; it must then be right."""
        try:
            tokens = await self._ask(client, number)
        except Refused as error:
            self.failed.append(str(error))
            await asyncio.sleep(0.05)
            return False
        assert tokens == self.answers[number], f"prompt {number}: {tokens}"
        return True

    async def _ask(self, client: httpx.AsyncClient, number: int) -> list[int]:
        body = {
            "model": "m", "prompt": prompt(number), "max_tokens": NEW_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "stream": True,
        }  # fmt: skip
        tokens: list[int] = []
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode()
                assert response.status_code in (500, 502, 503, 504), text
                raise Refused(json.loads(text)["error"]["message"])
            async for data in _data(response):
                if data == "[DONE]":
                    assert len(tokens) == NEW_TOKENS
                    return tokens
                event = json.loads(data)
                if "error" in event:
                    raise Refused(event["error"]["message"])
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or []
        raise AssertionError("The stream ended without [DONE].")

    @staticmethod
    def _client() -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=None))


class Refused(Exception):
    """A typed error instead of an answer."""


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
