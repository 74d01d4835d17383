"""A small closed-loop load generator for OpenAI-compatible servers: raw token times per request."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`requests` prompts of `input_len` random tokens, answered with `output_len` tokens each,
    `concurrency` at a time."""

    requests: int
    input_len: int
    output_len: int
    concurrency: int
    vocab: range
    """Token ids to draw prompts from."""
    seed: int = 0


@dataclass(slots=True)
class Record:
    """One request: when it was sent and when each token came, time.perf_counter seconds."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies in seconds."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def run(url: str, model: str, workload: Workload) -> list[Record]:
    """Send the workload to `url` (without /v1) and return one record per request."""
    rng = random.Random(workload.seed)
    prompts = [rng.choices(workload.vocab, k=workload.input_len) for _ in range(workload.requests)]
    todo = iter(prompts)
    records: list[Record] = []
    limits = httpx.Limits(max_connections=workload.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one_after_the_other() -> None:
            for prompt in todo:
                records.append(await _request(client, model, prompt, workload.output_len))

        await asyncio.gather(*(one_after_the_other() for _ in range(workload.concurrency)))
    return records


async def _request(
    client: httpx.AsyncClient, model: str, prompt: list[int], output_len: int
) -> Record:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    record = Record(sent=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                record.error = (await response.aread()).decode()[:200]
                return record
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _note(record, line[6:])
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    if not record.error and len(record.token_times) != output_len:
        record.error = f"{len(record.token_times)} tokens came instead of {output_len}."
    return record


def _note(record: Record, text: str) -> None:
    """Take down one chunk; a chunk of several tokens counts as many, all at the same moment."""
    now = time.perf_counter()
    chunk = json.loads(text)
    if "error" in chunk:
        record.error = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        record.token_times += [now] * len(choice.get("token_ids") or ())
