"""The C attention of prompts against float64: ragged chunks, windows, heads, bits in any batch."""

from __future__ import annotations

import pytest
import torch
from paged import pool

from pdserve.kernels import attention, native
from pdserve.kernels.checks import KernelError

HEADS = ((8, 4, 64), (4, 4, 64), (6, 1, 128), (4, 2, 256))
"""Query heads, KV heads, head size."""
CHUNKS = ((5, 5), (1, 9), (0, 12), (33, 70), (8, 520), (600, 1100), (64, 64))
"""Queries, context."""


def need(given: list[torch.Tensor]) -> None:
    if native.library() is None or not native.prefills(given[0], given[1]):
        pytest.skip("This processor has no instructions for bfloat16, or there is no compiler.")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 37, 700])
def test_it_is_exact_to_rounding(heads: tuple[int, int, int], window: int | None) -> None:
    torch.manual_seed(1)
    given = pool(list(CHUNKS), heads, 24)
    need(given)
    scale = heads[2] ** -0.5
    found = attention.attention_prefill(*given, scale=scale, window=window)
    exact = [part.double() if part.is_floating_point() else part for part in given]
    expected = attention._prefill(*exact, scale, window, None)  # type: ignore[arg-type]
    assert not found.isnan().any()
    assert (found - expected).abs().max() <= 1.2e-2 * expected.abs().max()


def test_a_chunk_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    torch.manual_seed(2)
    query, cache, starts, lens, table = pool(list(CHUNKS), HEADS[0], 16)
    need([query, cache])
    whole = native.attention_prefill(query, cache, starts, lens, table, scale=0.2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for row in range(len(CHUNKS)):
                first, last = int(starts[row]), int(starts[row + 1])
                alone = native.attention_prefill(
                    query[first:last], cache, torch.tensor([0, last - first]), lens[row : row + 1],
                    table[row : row + 1], scale=0.2,
                )  # fmt: skip
                assert torch.equal(alone, whole[first:last])
    finally:
        torch.set_num_threads(before)


def test_scores_of_any_size_and_nan_come_through() -> None:
    torch.manual_seed(3)
    query, cache, starts, lens, table = pool([(20, 20)], HEADS[0], 16)
    need([query, cache])
    large = native.attention_prefill(query * 300, cache, starts, lens, table, scale=1.0)
    assert large.isfinite().all()
    query[7, 3] = torch.nan
    found = native.attention_prefill(query, cache, starts, lens, table, scale=0.1)
    assert found[7, 3].isnan().all()
    assert not found[:7].isnan().any() and not found[8:].isnan().any()


def test_what_lies_outside_is_refused() -> None:
    query, cache, starts, lens, table = pool([(4, 40)], HEADS[0], 16)
    need([query, cache])
    with pytest.raises(KernelError, match="4 queries but a context of only 3"):
        attention.attention_prefill(
            query, cache, starts, torch.tensor([3]), table, scale=1.0
        )  # fmt: skip
    for bad_lens, bad_table in ((lens + 9, table), (lens, table + 3)):
        with pytest.raises(KernelError, match="outside"):
            native.attention_prefill(query, cache, starts, bad_lens, bad_table, scale=1.0)
