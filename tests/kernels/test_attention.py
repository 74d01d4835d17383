"""Paged attention against plain float64 loops, at sizes that are multiples of nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pdserve.kernels import KernelError, attention_decode, attention_prefill
from pdserve.kernels.attention import TILE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HEADS = [(4, 2, 16), (3, 3, 80), (8, 1, 64)]


class Paged:
    """Random K and V of some sequences, in scattered blocks of a pool that is NaN elsewhere."""

    def __init__(
        self,
        contexts: Sequence[int],
        heads: tuple[int, int, int],
        block_size: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.heads, kv_heads, dim = heads
        self.contexts = torch.tensor(contexts)
        widths = [-(-context // block_size) for context in contexts]
        blocks = sum(widths) + 3
        pool = torch.full((blocks, 2, 2, block_size, kv_heads, dim), math.nan, dtype=dtype)
        self.cache = pool[:, 1]  # a layer's view: blocks do not follow one another
        order = torch.randperm(blocks).tolist()
        # Entries past a sequence's end point to a block that is not there.
        self.table = torch.full((len(contexts), max(widths) + 1), 10**6)
        self.keys, self.values = [], []
        for row, context in enumerate(contexts):
            key, value = torch.randn(2, context, kv_heads, dim, dtype=torch.float64).to(dtype)
            self.keys.append(key)
            self.values.append(value)
            for token in range(context):
                if token % block_size == 0:
                    self.table[row, token // block_size] = order.pop()
                block = self.table[row, token // block_size]
                self.cache[block, 0, token % block_size] = key[token]
                self.cache[block, 1, token % block_size] = value[token]
        self.dtype = dtype

    def query(self, tokens: int) -> torch.Tensor:
        dim = self.cache.shape[-1]
        return torch.randn(tokens, self.heads, dim, dtype=torch.float64).to(self.dtype)

    def expected(
        self,
        query: torch.Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """The formula, one query head and one key at a time."""
        out = torch.zeros_like(query, dtype=torch.float64)
        group = query.shape[1] // self.cache.shape[3]
        row_of = 0
        for key, value, length in zip(self.keys, self.values, lengths, strict=True):
            for step in range(length):
                position = key.shape[0] - length + step
                first = 0 if window is None else max(0, position - window + 1)
                for head in range(query.shape[1]):
                    keys = key[first : position + 1, head // group].double()
                    scores = scale * keys @ query[row_of, head].double()
                    if soft_cap is not None:
                        scores = soft_cap * torch.tanh(scores / soft_cap)
                    weights = torch.exp(scores - scores.max())
                    values = value[first : position + 1, head // group].double()
                    out[row_of, head] = weights @ values / weights.sum()
                row_of += 1
        return out


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "Hq{}-H{}-D{}".format(*heads))
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, None), (None, 3.0), (4, 2.0)])
def test_decode_equals_the_formula(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, soft_cap: float | None
) -> None:
    contexts = [1, 17, 5, 63, 4]
    paged = Paged(contexts, heads, dtype=dtype)
    query = paged.query(len(contexts))
    actual = attention_decode(
        query,
        paged.cache,
        paged.contexts,
        paged.table,
        scale=0.3,
        window=window,
        soft_cap=soft_cap,
    )
    expected = paged.expected(query, [1] * len(contexts), 0.3, window, soft_cap)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "Hq{}-H{}-D{}".format(*heads))
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, None), (None, 3.0), (4, 2.0)])
def test_prefill_equals_the_formula(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, soft_cap: float | None
) -> None:
    contexts, lengths = [1, 17, 23, 6, 30], [1, 17, 5, 0, 29]
    paged = Paged(contexts, heads, dtype=dtype)
    query = paged.query(sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    actual = attention_prefill(
        query,
        paged.cache,
        starts,
        paged.contexts,
        paged.table,
        scale=0.3,
        window=window,
        soft_cap=soft_cap,
    )
    expected = paged.expected(query, lengths, 0.3, window, soft_cap)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 100, TILE + 11])
def test_a_chunk_of_several_tiles_equals_the_formula(window: int | None) -> None:
    lengths = [TILE + 37]
    paged = Paged([lengths[0] + 63], (2, 1, 8), block_size=16)
    query = paged.query(lengths[0])
    starts = torch.tensor([0, *lengths])
    actual = attention_prefill(
        query, paged.cache, starts, paged.contexts, paged.table, scale=1.0, window=window
    )
    assert_close(actual, paged.expected(query, lengths, 1.0, window, None), 1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(window: int | None) -> None:
    contexts, lengths = [40, 33, 1, 64, 17], [7, 33, 1, 30, 2]
    paged = Paged(contexts, (4, 2, 16))
    query = paged.query(sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    options: dict[str, Any] = {"scale": 0.2, "window": window}
    together = attention_prefill(query, paged.cache, starts, paged.contexts, paged.table, **options)
    last = query[starts[1:] - 1]
    decoded = attention_decode(last, paged.cache, paged.contexts, paged.table, **options)
    for row, length in enumerate(lengths):
        own = slice(int(starts[row]), int(starts[row + 1]))
        context, table = paged.contexts[row : row + 1], paged.table[row : row + 1]
        alone = attention_prefill(
            query[own], paged.cache, torch.tensor([0, length]), context, table, **options
        )
        assert torch.equal(alone, together[own])
        alone = attention_decode(last[row : row + 1], paged.cache, context, table, **options)
        assert torch.equal(alone, decoded[row : row + 1])


def test_an_empty_batch_is_empty() -> None:
    cache = torch.zeros(2, 2, 4, 1, 8)
    table, contexts = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    query = torch.zeros(0, 2, 8)
    assert attention_decode(query, cache, contexts, table, scale=1.0).shape == query.shape
    starts = torch.zeros(1, dtype=torch.int64)
    assert attention_prefill(query, cache, starts, contexts, table, scale=1.0).shape == query.shape


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": torch.zeros(1, 3, 8)}, "3 query heads must be a multiple of the 2 KV heads"),
        ({"query": torch.zeros(1, 4, 8).half()}, "query is float16 but cache is float32"),
        ({"query": torch.zeros(1, 4, 16)}, r"query must have the shape \[any, any, 8\]"),
        ({"block_table": torch.zeros(2, 1).long()}, "block_table must have the shape"),
        ({"block_table": torch.zeros(1, 1)}, "block_table must be int32 or int64, not float32"),
        ({"context_lens": torch.tensor([5])}, "block_table has room for 4 tokens"),
        ({"context_lens": torch.ones(1)}, "context_lens must be int32 or int64, not float32"),
        ({"window": 0}, "window must be at least 1"),
        ({"soft_cap": 0.0}, "soft_cap must be above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"cache": torch.zeros(2, 2, 4, 8, 2).mT}, "cache must be contiguous within"),
        ({"cache": torch.zeros(2, 4, 2, 8)}, "cache must have the shape"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 8),
        "cache": torch.zeros(2, 2, 4, 2, 8),
        "context_lens": torch.tensor([4]),
        "block_table": torch.zeros(1, 1).long(),
        "scale": 1.0,
    }
    with pytest.raises(KernelError, match=sentence):
        attention_decode(**{**arguments, **change})


@pytest.mark.parametrize(
    ("starts", "sentence"),
    [
        (torch.zeros(3), "query_start must be int32 or int64, not float32"),
        (torch.zeros(3, device="meta").long(), "query_start is on meta but query is on cpu"),
        (torch.zeros(6).long()[::2], "query_start must be contiguous, not 2 elements apart"),
    ],
)
def test_bad_starts_are_refused_with_a_sentence(starts: torch.Tensor, sentence: str) -> None:
    with pytest.raises(KernelError, match=sentence):
        attention_prefill(
            torch.zeros(2, 1, 8),
            torch.zeros(1, 2, 4, 1, 8),
            starts,
            torch.tensor([2, 2]),
            torch.zeros(2, 1).long(),
            scale=1.0,
        )


def test_more_queries_than_context_are_refused() -> None:
    with pytest.raises(KernelError, match="Sequence 0 has 3 queries but a context of only 2"):
        attention_prefill(
            torch.zeros(3, 1, 8),
            torch.zeros(1, 2, 4, 1, 8),
            torch.tensor([0, 3]),
            torch.tensor([2]),
            torch.zeros(1, 1).long(),
            scale=1.0,
        )
