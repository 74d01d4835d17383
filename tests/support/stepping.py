"""Drives a ModelRunner step by step without a scheduler, as the engine would."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pdserve.engine.build import Built
from pdserve.engine.ports import Chunk, ChunkResult
from pdserve.engine.request import Request
from pdserve.protocol.sampling import SamplingParams


def make_request(
    prompt: Sequence[int], blocks: Sequence[int] = (), output: Sequence[int] = (), **sampling: Any
) -> Request:
    """A greedy request (unless `sampling` says otherwise) that owns `blocks`."""
    params: dict[str, Any] = {"seed": 0, "max_tokens": 1000, "temperature": 0.0, **sampling}
    return Request(
        request_id="test",
        token_ids=[*prompt, *output],
        prompt_len=len(prompt),
        sampling=SamplingParams(**params),
        deadline=0.0,
        root=b"",
        block_table=list(blocks),
    )


class Stepper:
    """Requests over one pool, their blocks scattered over it and out of order."""

    def __init__(self, built: Built, seed: int = 0) -> None:
        self._built = built
        self._free = list(range(built.pool.num_blocks))
        random.Random(seed).shuffle(self._free)
        self.results: dict[Request, list[ChunkResult]] = {}

    def add(self, prompt: Sequence[int], room: int = 64, **sampling: Any) -> Request:
        """A request with blocks for its prompt and `room` more tokens."""
        count = -(-(len(prompt) + room) // self._built.pool.block_size)
        blocks = [self._free.pop() for _ in range(count)]
        request = make_request(prompt, blocks, **sampling)
        self.results[request] = []
        return request

    def step(self, requests: Sequence[Request], budget: int) -> None:
        """Compute up to `budget` tokens of each request, and draw where it is complete."""
        chunks = []
        for request in requests:
            length = min(budget, request.num_uncomputed)
            samples = length == request.num_uncomputed
            chunks.append(Chunk(request, request.num_computed, length, samples))
        for chunk, result in zip(chunks, self._built.runner.execute(chunks), strict=True):
            chunk.request.num_computed += chunk.length
            self.results[chunk.request].append(result)
            if result.token_id is not None:
                chunk.request.token_ids.append(result.token_id)

    def run(self, requests: Sequence[Request], tokens: int, budget: int = 10**6) -> list[list[int]]:
        """Step until every request has `tokens` new tokens; returns them. Prompts of different
        lengths make steps that mix prompt chunks and single tokens."""
        while running := [request for request in requests if request.num_output < tokens]:
            self.step(running, budget)
        return [request.token_ids[request.prompt_len :] for request in requests]
