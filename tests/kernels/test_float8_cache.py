"""A KV cache of float8_e4m3fn: what is stored, what attention makes of it, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdserve.kernels import (
    KernelError,
    attention_decode,
    attention_prefill,
    gather_blocks,
    rope,
    rope_and_store_kv,
    scatter_blocks,
    store_kv,
)

FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SCALES = {"k_scale": 0.11, "v_scale": 0.037}


def dtypes(implementation: str) -> list[torch.dtype]:
    """bfloat16 is left out where the interpreter computes it wrongly."""
    return [d for d in TOLERANCE if implementation == "reference" or d != torch.bfloat16]


def empty(blocks: int, size: int, heads: int, dim: int) -> torch.Tensor:
    """A layer's cache that is NaN everywhere, out of a pool of three layers."""
    return torch.full((blocks, 3, 2, size, heads, dim), 0x7F, dtype=torch.uint8).view(FLOAT8)[:, 1]


def test_every_number_is_rounded_to_the_nearest_and_limited(implementation: str) -> None:
    steps = torch.arange(0, 0x7F, dtype=torch.uint8).view(FLOAT8).double()
    between = (steps[1:] + steps[:-1]) / 2  # ties go to the even one
    beyond = torch.tensor([448.0, 449.0, 464.0, 480.0, 1e30, 2.0**-10, 2.0**-11, 1e-30, 0.0])
    random = torch.randn(400) * 10.0 ** torch.randint(-4, 3, (400,))
    x = torch.cat([steps.float(), between.float(), beyond, random])
    x = torch.cat([x, -x, torch.zeros(-2 * len(x) % 128)]).view(-1, 8, 16)
    cache = empty(x.shape[0], 1, 8, 16)
    store_kv(x, x, cache, torch.arange(x.shape[0]))
    expected = x.clamp(-448, 448).to(FLOAT8)
    for kind in (0, 1):
        assert torch.equal(cache[:, kind, 0].float(), expected.float())


def test_store_divides_by_the_scales_and_skips_padding(implementation: str) -> None:
    key, value = torch.randn(2, 6, 2, 24) * 3
    cos, sin = torch.randn(2, 6, 12)
    slots = torch.tensor([3, -1, 14, 7, 0, -1])
    alone, fused = empty(4, 4, 2, 24), empty(4, 4, 2, 24)
    store_kv(rope(key, cos, sin), value, alone, slots, **SCALES)
    rope_and_store_kv(key, key, value, cos, sin, fused, slots, **SCALES)
    assert torch.equal(fused.view(torch.uint8), alone.view(torch.uint8))
    turned = rope(key, cos, sin)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored = alone[slot // 4, :, slot % 4].float()
            scales = torch.tensor(list(SCALES.values())).view(2, 1, 1)
            error = stored * scales - torch.stack([turned[row], value[row]])
            assert (error.abs() <= stored.abs() * scales / 15 + scales / 1024).all()
    assert int(alone.isnan().all(-1).sum()) == 4 * 4 * 2 * 2 - 4 * 2 * 2


def sequences(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(query, cache, lengths, context, table): chunks of 1, 5 and 40 tokens over random bytes."""
    lengths, contexts = torch.tensor([1, 5, 20]), torch.tensor([33, 5, 281])
    cache = empty(60, 8, 2, 64)
    cache.copy_((torch.randn(cache.shape) * 20).clamp(-448, 448))
    table = torch.randperm(60)[: 3 * 19].view(3, 19)
    table = torch.cat([table, table[:, :19]], dim=1)
    query = torch.randn(int(lengths.sum()), 6, 64).to(dtype)
    return query, cache, lengths, contexts, table


def exact(
    query: torch.Tensor, cache: torch.Tensor, context: int, table: torch.Tensor
) -> torch.Tensor:
    """Attention of the last tokens of one sequence in float64, scale 0.3, cap 5."""
    wide = cache.to(torch.float64)[table].transpose(1, 2).flatten(0, 1)[:context]
    key, value = wide[:, 0] * SCALES["k_scale"], wide[:, 1] * SCALES["v_scale"]
    key, value = (part.repeat_interleave(3, 1).transpose(0, 1) for part in (key, value))
    scores = query.double().transpose(0, 1) @ key.mT * 0.3
    scores = 5 * torch.tanh(scores / 5)
    position = torch.arange(context - query.shape[0], context)[:, None]
    scores.masked_fill_(torch.arange(context) > position, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def test_attention_reads_it_as_if_it_were_wide(implementation: str) -> None:
    for dtype in dtypes(implementation):
        query, cache, lengths, contexts, table = sequences(dtype)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        options: dict[str, Any] = {"scale": 0.3, "soft_cap": 5.0, **SCALES}
        expected = [
            exact(query[starts[row] : starts[row + 1]], cache, int(contexts[row]), table[row])
            for row in range(3)
        ]
        chunks = attention_prefill(query, cache, starts, contexts, table, **options)
        last = query[starts[1:] - 1]
        tokens = attention_decode(last, cache, contexts, table, **options)
        few = attention_decode(last.unsqueeze(1), cache, contexts, table, **options)
        assert torch.equal(few[:, 0], tokens) or implementation == "reference"
        for result, wanted in (
            (chunks, torch.cat(expected)),
            (tokens, torch.stack([part[-1] for part in expected])),
            (few[:, 0], torch.stack([part[-1] for part in expected])),
        ):
            assert result.dtype == dtype
            error = (result.double() - wanted).norm() / wanted.norm()
            assert error.item() < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("block_size", [None, 3])
def test_blocks_of_it_travel_as_bytes(
    implementation: str, heads: tuple[int, int] | None, block_size: int | None
) -> None:
    bits = torch.randint(0, 256, (5, 2, 2, 4, 3, 8), dtype=torch.uint8)
    pool, ids = bits.view(FLOAT8), torch.tensor([4, 0])
    out = gather_blocks(pool, ids, heads=heads, block_size=block_size)
    assert out.dtype == FLOAT8
    expected = gather_blocks(bits, ids, heads=heads, block_size=block_size)
    assert torch.equal(out.view(torch.uint8), expected)
    back = torch.zeros_like(bits)
    scatter_blocks(out, back.view(FLOAT8), ids, heads=heads, block_size=block_size)
    first, count = heads or (0, 3)
    kept = (..., slice(first, first + count), slice(None))
    assert torch.equal(back[ids][kept], bits[ids][kept])
    assert back[1:4].count_nonzero() == 0


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    key, slots = torch.zeros(1, 2, 8), torch.tensor([0])
    wide, cache = torch.zeros(2, 2, 4, 2, 8), empty(2, 4, 2, 8)
    with pytest.raises(KernelError, match=r"k_scale \(0.5\) and v_scale \(1.0\) must be 1 for"):
        store_kv(key, key, wide, slots, k_scale=0.5)
    with pytest.raises(KernelError, match="v_scale must be a positive, finite number, not 0"):
        store_kv(key, key, cache, slots, v_scale=0.0)
    with pytest.raises(KernelError, match="key must be float32 or bfloat16 or float16"):
        store_kv(key.to(FLOAT8), key.to(FLOAT8), cache, slots)
    with pytest.raises(KernelError, match="query is float32 but cache is float16"):
        attention_decode(key, wide.half(), torch.tensor([1]), torch.zeros(1, 1).long(), scale=1.0)
