"""A layer over prompts' chunks and single tokens in C: against references, bits in any batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from paged import pool

from pdserve import kernels
from pdserve.kernels import attention, native
from pdserve.kernels.checks import KernelError
from pdserve.kernels.rope import default_frequencies, rope_table

HIDDEN, HEADS, KV_HEADS, DIM, INNER, BLOCK = 96, 4, 2, 64, 72, 16
CHUNKS = ((1, 9), (1, 30), (5, 5), (33, 70), (40, 40), (1, 1))
"""Queries, context. The last one is a prompt of one token that came behind the others."""
SINGLES = 2
COS, SIN = rope_table(default_frequencies(DIM, 100.0), torch.arange(80))


def layer(extras: bool, window: int | None) -> kernels.LayerTensors:
    """extras: biases and head norms."""

    def product(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = torch.randn(rows).bfloat16() if extras else None
        return (torch.randn(rows, columns) / math.sqrt(columns)).bfloat16(), bias

    norms = (torch.randn(DIM).bfloat16(), torch.randn(DIM).bfloat16()) if extras else None
    return kernels.LayerTensors(
        attention_norm=torch.rand(HIDDEN).bfloat16(),
        mlp_norm=torch.rand(HIDDEN).bfloat16(),
        head_norms=norms,
        query=product(HEADS * DIM, HIDDEN),
        key=product(KV_HEADS * DIM, HIDDEN),
        value=product(KV_HEADS * DIM, HIDDEN),
        output=product(HIDDEN, HEADS * DIM),
        gate=product(INNER, HIDDEN),
        up=product(INNER, HIDDEN),
        down=product(HIDDEN, INNER),
        window=window,
    )


class Case:
    """A batch over a cache in which what nobody may read is NaN."""

    def __init__(self) -> None:
        _, self.cache, self.starts, self.lens, self.table = pool(
            list(CHUNKS), (HEADS, KV_HEADS, DIM), BLOCK
        )
        self.hidden = torch.randn(int(self.starts[-1]), HIDDEN).bfloat16()
        places = [torch.arange(context - count, context) for count, context in CHUNKS]
        self.positions = torch.cat(places)
        self.slots = torch.cat(
            [
                row[at // BLOCK] * BLOCK + at % BLOCK
                for row, at in zip(self.table, places, strict=True)
            ]
        )

    def run(
        self,
        layers: list[kernels.LayerTensors],
        first: int = 0,
        last: int = len(CHUNKS),
        **changes: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences [first, last) through all layers: hidden states, and the cache."""
        rows = slice(int(self.starts[first]), int(self.starts[last]))
        hidden, cache = self.hidden[rows].clone(), self.cache.clone()
        step = kernels.ChunkStep(layers, cos=COS, sin=SIN, eps=1e-5)
        given = {
            "positions": self.positions[rows].clone(),
            "slots": self.slots[rows].clone(),
            "query_start": self.starts[first : last + 1] - self.starts[first],
            "context_lens": self.lens[first:last].clone(),
            "block_table": self.table[first:last].clone(),
            "singles": max(0, min(last, SINGLES) - first),
        }
        compute = step.begin(hidden, cache, **{**given, **changes})
        for index in range(len(layers)):
            compute(index, cache)
        return hidden, cache

    def expected(self, item: kernels.LayerTensors) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer from this package's references, in float64 where they can."""
        x, cache = self.hidden, self.cache.clone()

        def product(
            x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor | None]
        ) -> torch.Tensor:
            result = x.double() @ pair[0].double().T
            return (result if pair[1] is None else result + pair[1].double()).to(x.dtype)

        normed = kernels.rms_norm(x, item.attention_norm, 1e-5)
        query, key, value = (
            product(normed, part).unflatten(-1, (-1, DIM))
            for part in (item.query, item.key, item.value)
        )
        if item.head_norms is not None:
            query = kernels.rms_norm(query, item.head_norms[0], 1e-5)
            key = kernels.rms_norm(key, item.head_norms[1], 1e-5)
        angles = COS[self.positions], SIN[self.positions]
        query = kernels.rope_and_store_kv(query, key, value, *angles, cache, self.slots)
        mixed = attention._prefill(
            query.double(), cache.double(), self.starts, self.lens, self.table, DIM**-0.5,
            item.window, None,
        ).bfloat16()  # fmt: skip
        x = x + product(mixed.flatten(1), item.output)
        normed = kernels.rms_norm(x, item.mlp_norm, 1e-5)
        inner = kernels.silu_and_mul(product(normed, item.gate), product(normed, item.up))
        return x + product(inner, item.down), cache


@pytest.fixture(autouse=True)
def needed() -> None:
    torch.manual_seed(1)
    if native.library() is None or not kernels.ChunkStep.fits([layer(False, None)], DIM):
        pytest.skip("This processor has no instructions for bfloat16, or there is no compiler.")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    wanted = expected.double().nan_to_num()
    error = (found.double().nan_to_num() - wanted).abs().max()
    assert error <= 2.5e-2 * wanted.abs().max()


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_it_is_what_the_references_compute(extras: bool, window: int | None) -> None:
    case, item = Case(), layer(extras, window)
    for found, expected in zip(case.run([item]), case.expected(item), strict=True):
        close(found, expected)


def test_a_sequence_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    case, layers = Case(), [layer(True, None), layer(True, 20)]
    hidden, cache = case.run(layers)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for row in range(len(CHUNKS)):
                alone, left = case.run(layers, row, row + 1)
                assert torch.equal(alone, hidden[int(case.starts[row]) : int(case.starts[row + 1])])
                own = case.table[row][: -(-CHUNKS[row][1] // BLOCK)]
                assert torch.equal(left[own].nan_to_num(7.0), cache[own].nan_to_num(7.0))
    finally:
        torch.set_num_threads(before)


def test_sizes_that_do_not_fit_are_left_to_torch() -> None:
    item = layer(False, None)
    assert not kernels.ChunkStep.fits([item], DIM // 4)
    assert not kernels.ChunkStep.fits([], DIM)


def test_what_lies_outside_is_refused() -> None:
    layers = [layer(False, None)]
    for name, change in (("slots", 10**6), ("positions", 80), ("lens", 50), ("table", 99)):
        case = Case()
        setattr(case, name, getattr(case, name) + change)
        with pytest.raises(KernelError, match="outside"):
            case.run(layers)


def test_tokens_that_are_not_those_of_the_sequences_are_refused() -> None:
    case, layers = Case(), [layer(False, None)]
    for query_start in (case.starts + 1, case.starts - 1, case.starts * 2):
        with pytest.raises(KernelError, match="do not have all tokens"):
            case.run(layers, query_start=query_start)
    for singles in (-1, len(CHUNKS), len(CHUNKS) + 1):
        with pytest.raises(KernelError, match="do not have all tokens"):
            case.run(layers, singles=singles)
    with pytest.raises(KernelError, match="one more"):
        case.run(layers, query_start=case.starts[:-1])
    for name, numbers in (("positions", case.positions), ("query_start", case.starts)):
        with pytest.raises(KernelError, match="int64"):
            case.run(layers, **{name: numbers.int()})
