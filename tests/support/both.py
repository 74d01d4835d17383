"""One request to two clusters: one prefill and one decode worker, and one colocated worker.

What they answer must be the same, apart from ids, times, and what was found in whose prefix cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx
from anthropic import Anthropic
from openai import OpenAI

NAMES = frozenset(
    {"id", "created", "created_at", "request_id", "call_id", "item_id", "tool_use_id", "root",
     "cached_tokens", "prompt_tokens_details", "input_tokens_details", "cache_read_input_tokens",
     "cache_creation_input_tokens", "signature"}
)  # fmt: skip
"""Members that may differ."""
TOLERANCE = 1e-3
"""Of log-probabilities: batches and chunks round differently."""


class Both:
    """Clients of the two, with the same methods."""

    def __init__(self, urls: tuple[str, str], **headers: str) -> None:
        self._http = [
            httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers) for url in urls
        ]
        self._openai = [OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) for url in urls]
        self._anthropic = [Anthropic(base_url=url, api_key="k", max_retries=0) for url in urls]

    def close(self) -> None:
        for client in (*self._http, *self._openai, *self._anthropic):
            client.close()

    def send(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """The first one's answer."""
        first, second = (
            client.request(method, path, json=body, **options) for client in self._http
        )
        assert first.status_code == second.status_code, (first.text, second.text)
        return first

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        """The body of both answers."""
        first, second = (client.post(path, json=body) for client in self._http)
        assert first.status_code == second.status_code == status, (first.text, second.text)
        check_same(first.json(), second.json())
        return first.json()

    def frames(self, path: str, **body: Any) -> list[Any]:
        """The data of the first one's events, without [DONE], which must end a stream that is not
        of named events. How tokens are dealt out to events may differ."""
        found = []
        for client in self._http:
            answer = client.post(path, json={"stream": True, **body})
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            found.append(events_of(answer.text))
        assert {_kind(frame) for frame in found[0]} == {_kind(frame) for frame in found[1]}
        return found[0]

    def openai(self, ask: Callable[[OpenAI], Any]) -> Any:
        """What the official client makes of it."""
        return self._asked(ask, self._openai)

    def anthropic(self, ask: Callable[[Anthropic], Any]) -> Any:
        return self._asked(ask, self._anthropic)

    def _asked(self, ask: Callable[[Any], Any], clients: list[Any]) -> Any:
        first, second = map(ask, clients)
        check_same(_plain(first), _plain(second))
        return first


def events_of(text: str) -> list[Any]:
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    lines = [frame.rpartition("data: ")[2] for frame in frames]
    if not frames[0].startswith("event: "):
        assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def _kind(frame: Any) -> Any:
    return frame.get("type", frame.get("object"))


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def check_same(first: Any, second: Any, where: str = "") -> None:
    """Raises AssertionError that names the place of the first difference."""
    if isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys(), f"{where}: {first.keys() ^ second.keys()}"
        for name in first.keys() - NAMES:
            check_same(first[name], second[name], f"{where}.{name}")
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        assert len(first) == len(second), f"{where}: {len(first)} and {len(second)} entries"
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            check_same(one, other, f"{where}[{place}]")
    elif isinstance(first, float) and isinstance(second, float):
        assert math.isclose(first, second, abs_tol=TOLERANCE), f"{where}: {first} and {second}"
    else:
        assert first == second, f"{where}: {first!r:.300} and {second!r:.300}"
