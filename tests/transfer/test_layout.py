"""Plans between layouts, carried out and compared with the whole KV cache, element by element."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.kv_transfer.layout import Layout, LayoutError, plan
from pdserve.kv_transfer.relayout import carry_out

BASE = Layout(num_layers=2, num_kv_heads=4, head_dim=3, block_size=4, dtype="float32")
SPARE = 3
POISON = -7.0


def whole(layout: Layout, num_tokens: int) -> torch.Tensor:
    """[L, 2, T, H, D]: small whole numbers, exact in every dtype, neighbours all different."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 37 % 251).float().reshape(shape)


def pools_of(layout: Layout, blocks: list[int], kv: torch.Tensor | None) -> list[torch.Tensor]:
    """One pool per rank; filled from `kv`, written here by the definition of the layout."""
    pools = []
    for rank in range(layout.tp_size):
        pool = torch.full(layout.pool_shape(len(blocks) + SPARE), POISON)
        pool = pool.to(getattr(torch, layout.dtype))
        for token in range(kv.shape[2] if kv is not None else 0):
            block, row = blocks[token // layout.block_size], token % layout.block_size
            for head in range(layout.heads_per_rank):
                assert kv is not None
                pool[block, :, :, row, head] = kv[:, :, token, layout.first_head(rank) + head]
        pools.append(pool)
    return pools


def some_blocks(layout: Layout, num_tokens: int, seed: int) -> list[int]:
    count = -(-num_tokens // layout.block_size)
    return random.Random(seed).sample(range(count + SPARE), count)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    ranks = [n for n in (1, 2, 3, 4, 8) if heads % n == 0 or n % heads == 0]

    def one() -> Layout:
        return Layout(
            num_layers=2,
            num_kv_heads=heads,
            head_dim=2,
            block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
            dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
            tp_size=draw(st.sampled_from(ranks)),
        )

    return one(), one()


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 33), st.integers(0, 9), st.data())
def test_every_token_and_head_arrives_and_nothing_else_changes(
    pair: tuple[Layout, Layout], num_tokens: int, seed: int, data: st.DataObject
) -> None:
    source, target = pair
    kv = whole(source, num_tokens)
    theirs, ours = some_blocks(source, num_tokens, seed), some_blocks(target, num_tokens, seed + 1)
    wanted = data.draw(st.lists(st.integers(0, len(ours) - 1), unique=True))
    sources, targets = pools_of(source, theirs, kv), pools_of(target, ours, None)
    made = plan(source, target, num_tokens, theirs, ours, wanted)
    assert made.converts is (source.dtype != target.dtype)
    carry_out(made, sources, targets)
    expected = pools_of(target, ours, kv)
    untouched = set(range(len(ours) + SPARE)) - {ours[index] for index in wanted}
    for pool, right in zip(targets, expected, strict=True):
        for index in wanted:
            rows = min(target.block_size, num_tokens - index * target.block_size)
            assert torch.equal(pool[ours[index], :, :, :rows], right[ours[index], :, :, :rows])
        for block in untouched:
            assert (pool[block] == POISON).all()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4), (8, 2), (1, 8)])
def test_other_degrees_take_few_copies(before: int, after: int) -> None:
    source = dataclasses.replace(BASE, tp_size=before)
    target = dataclasses.replace(BASE, tp_size=after)
    made = plan(source, target, 40, range(10), range(10))
    assert len(made.copies) <= max(before, after)
    assert all(len(copy.source_blocks) == 10 for copy in made.copies)


def test_equal_layouts_move_whole_blocks() -> None:
    made = plan(BASE, BASE, 9, [5, 0, 2], [1, 2, 3])
    (copy,) = made.copies
    assert made.whole_blocks and made.exact and not made.converts
    assert (copy.tokens, copy.heads) == (BASE.block_size, BASE.num_kv_heads)
    assert (copy.source_blocks, copy.target_blocks) == ((5, 0, 2), (1, 2, 3))


def test_replicas_share_the_work() -> None:
    source = dataclasses.replace(BASE, num_kv_heads=2, tp_size=8)
    target = dataclasses.replace(BASE, num_kv_heads=2, tp_size=8)
    made = plan(source, target, 4, [0], [0])
    assert {copy.source.rank for copy in made.copies} == set(range(8))


def test_conversions_say_whether_they_are_exact() -> None:
    half = dataclasses.replace(BASE, dtype="bfloat16")
    assert plan(half, BASE, 4, [0], [0]).exact
    narrowing = plan(BASE, half, 4, [0], [0])
    assert narrowing.converts and not narrowing.exact


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 3}, "num_layers: 2 at the source, 3 at the target"),
        ({"num_kv_heads": 8}, "num_kv_heads"),
        ({"head_dim": 4}, "head_dim"),
        ({"block_size": 2}, "need 2 blocks at the target"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(change: dict[str, int], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        plan(BASE, dataclasses.replace(BASE, **change), 4, [0], [0])  # type: ignore[arg-type]


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(LayoutError, match="4 KV heads cannot be spread evenly over 3 ranks"):
        dataclasses.replace(BASE, tp_size=3)
    with pytest.raises(LayoutError, match="at least 1"):
        dataclasses.replace(BASE, block_size=0)
    with pytest.raises(LayoutError, match="occurs twice at the target"):
        plan(BASE, BASE, 8, [0, 1], [2, 2])
    with pytest.raises(LayoutError, match="among the target's 1"):
        plan(BASE, BASE, 4, [0], [0], wanted=[1])


def test_pools_that_are_not_as_planned() -> None:
    made = plan(BASE, BASE, 4, [0], [0])
    pool = torch.zeros(BASE.pool_shape(1))
    with pytest.raises(LayoutError, match="target has 1 ranks"):
        carry_out(made, [pool], [pool, pool])
    with pytest.raises(LayoutError, match="A pool of the source must be"):
        carry_out(made, [pool.double()], [pool])
