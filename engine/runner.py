"""Turns a step's plan into tokens: tensors in, kernels through, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch

from pdserve.engine import sampler
from pdserve.engine.grammar import Matcher
from pdserve.engine.graphs import Capture, DecodeGraphs, ladder
from pdserve.engine.models.decoder import Batch, Decoder
from pdserve.engine.numbers import to_device
from pdserve.engine.pool import KVPool
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.engine.request import Request
from pdserve.protocol.grammar import Constraint
from pdserve.protocol.messages import PositionLogprobs
from pdserve.protocol.sampling import SamplingParams

LOGITS_BYTES = 64 << 20
"""Most memory for the logits of prompt positions; a long prompt's are made piece by piece."""
_WARM_UP_TOKENS = 32
_WARM_UP_SAMPLING = SamplingParams(
    seed=0,
    max_tokens=1,
    top_p=0.9,
    presence_penalty=0.5,
    logprobs=1,
    constraint=Constraint(allowed=(0,)),
)
"""Takes a token through every operation between logits and answer."""


class ModelRunner:
    """Computes chunks of requests on one device. Keeps nothing between steps but weights, KV, and
    recordings of decode steps (`record`)."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        device: str,
        logprobs_mode: str = "raw_logprobs",
        seeks_nans: bool = False,
    ) -> None:
        """`logprobs_mode`: one of LOGPROBS_MODES. `seeks_nans`: say which tokens were drawn from
        logits that are not numbers."""
        self._seeks_nans = seeks_nans
        self._shaped = logprobs_mode.startswith("processed")
        self._normalised = logprobs_mode.endswith("logprobs")
        self._decoder = decoder
        self._caches = [pool.layer(index) for index in range(decoder.config.num_layers)]
        self._block_size = pool.block_size
        self._num_blocks = pool.num_blocks
        self._device = device
        self._graphs: DecodeGraphs | None = None
        self.progress: Callable[[], None] = lambda: None
        """Called within a step whenever a part of it is done, unless it is computed in one call."""

    @torch.inference_mode()
    def execute(self, chunks: Sequence[Chunk], watcher: Watcher | None = None) -> list[ChunkResult]:
        """Run one step (see engine.ports.Runner). The chunks' requests are not changed."""
        if not chunks:
            return []
        # Single tokens first: they take the decode kernel, longer chunks the prefill kernel.
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].length > 1)
        ordered = [chunks[index] for index in order]
        ends = list(accumulate(chunk.length for chunk in ordered))
        batch = self._batch(ordered, ends)
        if self._graphs is not None and self._graphs.fits(batch):
            hidden = self._graphs.forward(batch)
        else:
            hidden = self._decoder.forward(batch, self._caches, self._after_layers(watcher))
        drawn = self._draw(ordered, ends, hidden)
        if self._device.startswith("cuda") and any(chunk.request.hand_off for chunk in chunks):
            torch.cuda.current_stream(self._device).synchronize()  # others read it from here on
        results = [ChunkResult()] * len(chunks)
        for index, chunk, end, draw in zip(order, ordered, ends, drawn, strict=True):
            prompt = self._prompt_logprobs(chunk, hidden[end - chunk.length : end])
            token_id, logprobs, corrupted = draw
            results[index] = ChunkResult(token_id, logprobs, prompt, corrupted)
        return results

    def _after_layers(self, watcher: Watcher | None) -> Callable[[int], None]:
        """What shows progress after each layer, and tells the watcher after each slice of them but
        the last."""
        if watcher is None:
            return lambda count: self.progress()
        layers = self._decoder.config.num_layers // watcher.slices

        def after(count: int) -> None:
            self.progress()
            done, rest = divmod(count, layers)
            if not rest and done < watcher.slices:
                watcher.tell(done, self._computed())

        return after

    def _computed(self) -> Callable[[], None] | None:
        """What waits until the device has done what it was given so far."""
        if not self._device.startswith("cuda"):
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def warm_up(self, max_model_len: int) -> int:
        """Run a small prompt and a token through everything, so that the first request does not
        pay for what libraries set up on first use; returns how many tokens that were. Writes into
        the pool's first blocks, so it must come before any request owns them."""
        length = min(_WARM_UP_TOKENS, self._num_blocks * self._block_size - 1, max_model_len - 1)
        request = Request(
            request_id="warm-up",
            token_ids=[0] * (length + 1),
            prompt_len=length + 1,
            sampling=_WARM_UP_SAMPLING,
            deadline=0.0,
            root=b"",
            matcher=Matcher(_WARM_UP_SAMPLING, None),
            block_table=list(range(length // self._block_size + 1)),
        )
        self.execute([Chunk(request, 0, length, samples=False)])
        self.execute([Chunk(request, length, 1, samples=True)])
        return length + 1

    @torch.inference_mode()
    def record(self, max_num_seqs: int, max_model_len: int, capture: Capture) -> None:
        """Record decode steps of up to `max_num_seqs` requests (see engine.graphs)."""
        self._graphs = DecodeGraphs(
            self._decoder,
            self._caches,
            sizes=ladder(max_num_seqs),
            blocks=-(-max_model_len // self._block_size),
            device=self._device,
            capture=capture,
        )

    def _batch(self, chunks: Sequence[Chunk], ends: Sequence[int]) -> Batch:
        size = self._block_size
        total = ends[-1]
        token_ids = np.empty(total, dtype=np.int64)
        positions = np.empty(total, dtype=np.int64)
        slots = np.empty(total, dtype=np.int64)
        context_lens = np.array([chunk.start + chunk.length for chunk in chunks], dtype=np.int64)
        widths = -(-context_lens // size)
        table = np.zeros((len(chunks), int(widths.max())), dtype=np.int64)
        for row, (chunk, end, width) in enumerate(zip(chunks, ends, widths.tolist(), strict=True)):
            first, last = chunk.start, chunk.start + chunk.length
            blocks = chunk.request.block_table
            table[row, :width] = blocks if len(blocks) == width else blocks[:width]
            if chunk.length == 1:
                token_ids[end - 1] = chunk.request.token_ids[first]
                positions[end - 1] = first
                slots[end - 1] = blocks[first // size] * size + first % size
                continue
            rows = slice(end - chunk.length, end)
            token_ids[rows] = chunk.request.token_ids[first:last]
            positions[rows] = np.arange(first, last)
            slots[rows] = table[row, positions[rows] // size] * size + positions[rows] % size
        starts = np.array([0, *ends], dtype=np.int64)
        arrays = (token_ids, positions, slots, starts, context_lens, table)
        there = to_device(arrays, self._device)
        return Batch(
            token_ids=there[0],
            positions=there[1],
            slots=there[2],
            query_start=there[3],
            context_lens=there[4],
            block_table=there[5],
            num_decodes=sum(chunk.length == 1 for chunk in chunks),
        )

    def _draw(
        self, chunks: Sequence[Chunk], ends: Sequence[int], hidden: torch.Tensor
    ) -> list[tuple[int | None, PositionLogprobs | None, bool]]:
        """The drawn token of each chunk that samples, its log-probabilities if wanted, and whether
        it is known that logits were not numbers."""
        drawing = [index for index, chunk in enumerate(chunks) if chunk.samples]
        drawn: list[tuple[int | None, PositionLogprobs | None, bool]]
        drawn = [(None, None, False)] * len(chunks)
        if not drawing:
            return drawn
        if len(drawing) < len(hidden):
            hidden = hidden[[ends[index] - 1 for index in drawing]]
        logits = self._decoder.logits(hidden)
        requests = [chunks[index].request for index in drawing]
        wanted = [
            row for row, request in enumerate(requests) if request.sampling.logprobs is not None
        ]
        told = logits[wanted] if wanted and not self._shaped else None
        nans = [False] * len(drawing)
        if self._seeks_nans:
            nans = logits.isnan().any(dim=1).tolist()
        tokens = sampler.draw(logits, requests)
        if wanted and self._shaped:
            told = sampler.processed(logits[wanted], [requests[row] for row in wanted])
        for index, token_id, corrupted in zip(drawing, tokens, nans, strict=True):
            drawn[index] = (token_id, None, corrupted)
        if told is not None:
            chosen, params = zip(*((tokens[r], requests[r].sampling) for r in wanted), strict=True)
            logprobs = sampler.answer_logprobs(told, chosen, params, self._normalised)
            for row, entry in zip(wanted, logprobs, strict=True):
                drawn[drawing[row]] = (tokens[row], entry, nans[row])
        return drawn

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> list[PositionLogprobs]:
        """Of the prompt tokens start + 1 .. that the chunk's hidden states [length, E] predict."""
        request = chunk.request
        top = request.sampling.prompt_logprobs
        last = min(chunk.start + chunk.length, request.prompt_len - 1)
        if top is None or last <= chunk.start:
            return []
        entries: list[PositionLogprobs] = []
        step = max(1, LOGITS_BYTES // (4 * self._decoder.config.vocab_size))
        for first in range(chunk.start, last, step):
            end = min(first + step, last)
            logits = self._decoder.logits(hidden[first - chunk.start : end - chunk.start])
            token_ids = request.token_ids[first + 1 : end + 1]
            self.progress()
            entries += sampler.position_logprobs(logits, token_ids, [top] * len(token_ids))
        return entries
