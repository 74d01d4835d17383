"""Asks a router for a real token: the proof that a cluster serves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx

from pdserve.cluster.records import ROUTER_HEADER
from pdserve.protocol.errors import PdserveError

ANSWER_TIMEOUT_S = 60.0
"""For the first tokens of a cold cluster."""
PAUSE_S = 0.05


class ProbeFailed(PdserveError):
    """The cluster did not answer as it should."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A cluster that answered."""

    model: str
    """The name under which it serves its model."""
    text: str


class Probe:
    """A client of one router, with the first of its API keys. The router is a process of ours on
    this machine, and its certificate may name other addresses: it is not checked."""

    def __init__(self, url: str, api_keys: tuple[str, ...]) -> None:
        headers = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=ANSWER_TIMEOUT_S,
            trust_env=False,
            verify=False,  # noqa: S501
        )

    async def healthy(self) -> int | None:
        """The process id of the router that says that it can serve requests (0 if it does not give
        one); None if nobody does. Each question may reach another of several routers."""
        try:
            answer = await self._client.get("/health", headers={"Connection": "close"})
        except httpx.TransportError:
            return None
        if answer.status_code != 200:
            return None
        number = answer.headers.get(ROUTER_HEADER, "")
        return int(number) if number.isdecimal() else 0

    async def two_tokens(self, within_s: float) -> Proof:
        """Two tokens: the first is drawn by a prefill worker, the second by a decode worker that
        got its KV blocks. Raises ProbeFailed if none come in time."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                return await self._ask()
            except (httpx.TransportError, ProbeFailed) as error:
                if time.monotonic() > deadline:
                    reason = str(error) or type(error).__name__
                    raise ProbeFailed(f"The cluster does not answer: {reason}") from error
            await asyncio.sleep(PAUSE_S)

    async def _ask(self) -> Proof:
        model = str((await self._json("GET", "/v1/models"))["data"][0]["id"])
        body = {
            "model": model,
            "prompt": "Hello",
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = await self._json("POST", "/v1/completions", json=body)
        count = answer["usage"]["completion_tokens"]
        if count != 2:
            raise ProbeFailed(f"The router answered {count} tokens instead of 2.")
        return Proof(model, str(answer["choices"][0]["text"]))

    async def _json(self, method: str, path: str, **arguments: Any) -> Any:
        response = await self._client.request(method, path, **arguments)
        if response.status_code != 200:
            raise ProbeFailed(
                f"{method} {path} was answered {response.status_code}: {response.text[:500]}"
            )
        return response.json()

    async def close(self) -> None:
        await self._client.aclose()
