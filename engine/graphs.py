"""CUDA graphs for decode steps: one recording per size of a ladder, larger batches run as they are.

A recording replays its kernels on the tensors that it was made with, so a step copies its numbers
into those and pads the rest with tokens that are nowhere: slot -1 is not written, a context of 0 is
not read. Captured when the worker starts, never in the path of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pdserve.engine.models.decoder import Batch, Decoder

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Takes a step over fixed tensors; gives a step that does the same, sooner."""
COLUMNS = ("token_ids", "positions", "slots", "context_lens")
PADDING = {"slots": -1}
"""What rows of padding hold; 0 where nothing is said."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One size: the tensors that a replay reads, and the replay."""

    inputs: Batch
    replay: Step


class DecodeGraphs:
    """Recorded decode steps of a model. Owns the recordings and their inputs."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[torch.Tensor],
        *,
        sizes: Sequence[int],
        blocks: int,
        device: str,
        capture: Capture,
    ) -> None:
        """sizes: ascending; blocks: entries of a row of the block table, enough for the longest
        request. The KV of no request is touched."""
        self._blocks = blocks
        self._recordings: dict[int, Recording] = {}
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            inputs = _blank(size, blocks, device)

            def step(inputs: Batch = inputs) -> torch.Tensor:
                return decoder.forward(inputs, caches)

            self._recordings[size] = Recording(inputs, capture(step))
        self._sizes = tuple(sizes)

    def fits(self, batch: Batch) -> bool:
        """Whether there is a recording for this step: single tokens, and not too many."""
        count = batch.token_ids.shape[0]
        return (
            count == batch.num_decodes
            and 0 < count <= self._sizes[-1]
            and batch.block_table.shape[1] <= self._blocks
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `Decoder.forward`, for a batch that `fits`. The result is overwritten by the next."""
        count = batch.token_ids.shape[0]
        recording = self._recordings[next(size for size in self._sizes if size >= count)]
        inputs = recording.inputs
        for name in COLUMNS:
            target: torch.Tensor = getattr(inputs, name)
            target[:count].copy_(getattr(batch, name), non_blocking=True)
            target[count:].fill_(PADDING.get(name, 0))
        inputs.block_table[:count, : batch.block_table.shape[1]].copy_(batch.block_table)
        return recording.replay()[:count]


def ladder(largest: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 8 up to 64, of 32 beyond; the last one is `largest`."""
    sizes = [1, 2, 4, *range(8, min(largest, 64) + 1, 8), *range(96, largest + 1, 32)]
    return sorted({size for size in sizes if size <= largest} | {largest})


def cuda_capture() -> Capture:
    """Captures in one pool of memory, each after a run that compiles and warms up."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture


def _blank(size: int, blocks: int, device: str) -> Batch:
    """A batch of padding only."""
    columns = {name: torch.full((size,), PADDING.get(name, 0), device=device) for name in COLUMNS}
    return Batch(
        **columns,
        query_start=torch.arange(size + 1, device=device),
        block_table=torch.zeros((size, blocks), dtype=torch.int64, device=device),
        num_decodes=size,
    )
