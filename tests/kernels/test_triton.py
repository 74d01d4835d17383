"""The Triton kernels in their interpreter, through the public functions, against float64 and the
references. bfloat16 products are left out: the interpreter computes them wrongly (the script
bench/gpu/check.sh compares them on a GPU)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import dispatch

triton = pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
floats = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])

pytestmark = pytest.mark.usefixtures("interpreted")


def reference(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """From here on, the operation runs as its reference."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, f"triton,{operation}=reference")
    dispatch.forget()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative error of the whole, as the tolerances of the issue are meant."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(1e-30)
    assert error.item() < TOLERANCE[actual.dtype], f"relative error {error.item():.2e}"


def test_everything_runs_in_triton() -> None:
    x = torch.zeros(1)
    for operation in dispatch.MODULES:
        function = dispatch.implementation(operation, x)
        assert function is not None
        assert function.__module__.startswith("pdserve.kernels.triton_")


@floats
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (17, 63), (3, 500), (2, 4097)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual = (torch.randn(2, rows, width) * 3).to(dtype)
    weight = torch.randn(width).to(dtype)

    def expected(x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert_close(kernels.rms_norm(x, weight, 1e-5), expected(x))
    normed, total = kernels.fused_add_rms_norm(x, residual, weight, 1e-5)
    if dtype == torch.bfloat16:  # which the interpreter cuts off instead of rounding
        assert_close(total, x.double() + residual.double())
    else:
        assert torch.equal(total, x + residual)
    assert_close(normed, expected(total))


@halves
def test_rms_norm_of_heads_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, 3, 16).to(dtype)[:, 1:3]
    weight = torch.randn(16).to(dtype)
    for view in (x, x[:, :, 1], x[:, 0]):
        wide = view.double()
        norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        assert_close(kernels.rms_norm(view, weight, 1e-6), norm)


@floats
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (17, 501), (1, 4097)])
def test_gated_activations(dtype: torch.dtype, rows: int, width: int) -> None:
    fused = (torch.randn(rows, 2 * width) * 3).to(dtype)
    gate, up = fused[:, :width], fused[:, width:]
    x, other = gate.double(), up.double()
    assert_close(kernels.silu_and_mul(gate, up), x / (1 + torch.exp(-x)) * other)
    normal = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert_close(kernels.gelu_and_mul(gate, up), x * normal * other)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert_close(kernels.gelu_and_mul(gate, up, tanh=True), 0.5 * x * (1 + inner.tanh()) * other)


@floats
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (17, 16), (3, 80), (2, 96)])
def test_rope(dtype: torch.dtype, interleaved: bool, heads: int, dim: int) -> None:
    x = torch.randn(5, heads + 1, dim).to(dtype)[:, 1:]
    cos, sin = torch.randn(2, 5, dim // 2)
    pairs = x.double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    first, second = pairs.select(axis, 0), pairs.select(axis, 1)
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    turned = torch.stack([first * c - second * s, second * c + first * s], axis).flatten(-2)
    assert_close(kernels.rope(x, cos, sin, interleaved=interleaved), turned)


@floats
@pytest.mark.parametrize("dim", [8, 7])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_store_kv_writes_its_slots_and_nothing_else(
    dtype: torch.dtype, dim: int, tokens: int
) -> None:
    pool = torch.full((30, 3, 2, 5, 9, dim), 7.0, dtype=dtype)
    key, value = torch.randn(2, tokens, 9, dim).to(dtype)
    slots = torch.randperm(30 * 5)[:tokens]
    slots[1::4] = -1  # padding
    kernels.store_kv(key, value, pool[:, 1], slots)
    expected = torch.full_like(pool, 7.0)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 5, 1, 0, slot % 5] = key[row]
            expected[slot // 5, 1, 1, slot % 5] = value[row]
    assert torch.equal(pool, expected)


@floats
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_the_fused_pass_equals_its_parts(dtype: torch.dtype, interleaved: bool) -> None:
    query, key = torch.randn(6, 9, 24).to(dtype), torch.randn(6, 3, 24).to(dtype)
    value = torch.randn(6, 2, 3, 24).to(dtype)[:, 1]
    cos, sin = torch.randn(2, 6, 12)
    slots = torch.randperm(12)[:6]
    fused, parts = torch.zeros(2, 3, 2, 4, 3, 24, dtype=dtype)
    turned = kernels.rope_and_store_kv(
        query, key, value, cos, sin, fused, slots, interleaved=interleaved
    )
    kernels.store_kv(kernels.rope(key, cos, sin, interleaved=interleaved), value, parts, slots)
    assert torch.equal(turned, kernels.rope(query, cos, sin, interleaved=interleaved))
    assert torch.equal(fused, parts)


@halves
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dim", [24, 64])
def test_the_fused_pass_norms_heads_first(
    dtype: torch.dtype, interleaved: bool, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(6, 9, dim).to(dtype) * 3, torch.randn(6, 3, dim + 2).to(dtype)[..., 2:]
    value = torch.randn(6, 3, dim).to(dtype)
    weights = torch.randn(2, dim).to(dtype)
    cos, sin = torch.randn(2, 6, dim // 2)
    slots = torch.randperm(12)[:6]
    slots[2] = -1
    options: dict[str, Any] = {
        "norms": (weights[0], weights[1], 1e-5), "interleaved": interleaved
    }  # fmt: skip
    fused, parts = torch.zeros(2, 3, 2, 4, 3, dim, dtype=dtype)
    turned = kernels.rope_and_store_kv(query, key, value, cos, sin, fused, slots, **options)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    dispatch.forget()
    expected = kernels.rope_and_store_kv(query, key, value, cos, sin, parts, slots, **options)
    assert_close(turned, expected)
    assert_close(fused, parts)
    plain = kernels.rope(
        kernels.rms_norm(query, weights[0], 1e-5), cos, sin, interleaved=interleaved
    )
    assert torch.equal(expected, plain)
    with pytest.raises(kernels.KernelError, match=r"norms\[1\] must have the shape"):
        options["norms"] = (weights[0], weights[1][:-1], 1e-5)
        kernels.rope_and_store_kv(query, key, value, cos, sin, parts, slots, **options)


class Paged:
    """Random K and V of some sequences, in scattered blocks of a pool that is NaN elsewhere."""

    def __init__(
        self, contexts: Sequence[int], heads: tuple[int, int, int], dtype: torch.dtype, size: int
    ) -> None:
        _, kv_heads, dim = heads
        widths = [-(-context // size) for context in contexts]
        blocks = sum(widths) + 3
        self.cache = torch.full((blocks, 2, 2, size, kv_heads, dim), math.nan, dtype=dtype)[:, 1]
        self.contexts = torch.tensor(contexts)
        # A table whose entries are far apart, and which points nowhere past a sequence's end.
        self.table = torch.full((len(contexts), max(widths, default=0) + 1, 2), 10**6)[:, :, 1]
        self.keys, self.values = [], []
        order = torch.randperm(blocks).tolist()
        for row, context in enumerate(contexts):
            key, value = torch.randn(2, context, kv_heads, dim).to(dtype)
            self.keys.append(key)
            self.values.append(value)
            for first in range(0, context, size):
                block = self.table[row, first // size] = order.pop()
                count = min(size, context - first)
                self.cache[block, 0, :count] = key[first : first + count]
                self.cache[block, 1, :count] = value[first : first + count]

    def expected(
        self, query: torch.Tensor, lengths: Sequence[int], window: int | None, cap: float | None
    ) -> torch.Tensor:
        """The formula in float64 with scale 0.3; query: [T, Hq, D]."""
        parts, row = [], 0
        for key, value, length in zip(self.keys, self.values, lengths, strict=True):
            group = query.shape[1] // key.shape[1]
            keys = key.double().repeat_interleave(group, 1).transpose(0, 1)
            values = value.double().repeat_interleave(group, 1).transpose(0, 1)
            scores = 0.3 * query[row : row + length].double().transpose(0, 1) @ keys.mT
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            position = torch.arange(key.shape[0] - length, key.shape[0])[:, None]
            distance = position - torch.arange(key.shape[0])
            hidden = (distance < 0) | (distance >= (window or 10**9))
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            parts.append((weights @ values).transpose(0, 1))
            row += length
        return torch.cat(parts)


VARIANTS = pytest.mark.parametrize(
    ("window", "cap"),
    [(None, None), (7, None), (70, 3.0), (None, 3.0)],
    ids=["plain", "window7", "window70-cap", "cap"],
)
HEADS = pytest.mark.parametrize(
    "heads",
    [(4, 2, 64), (3, 3, 80), (7, 1, 96), (8, 1, 128), (2, 1, 256)],
    ids=lambda heads: "Hq{}-H{}-D{}".format(*heads),
)


@halves
@HEADS
@VARIANTS
def test_attention_decode(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, cap: float | None
) -> None:
    contexts = [1, 17, 63, 300]
    paged = Paged(contexts, heads, dtype, 5)
    query = torch.randn(4, heads[0], heads[2]).to(dtype)
    actual = kernels.attention_decode(
        query, paged.cache, paged.contexts, paged.table, scale=0.3, window=window, soft_cap=cap
    )
    assert_close(actual, paged.expected(query, [1] * 4, window, cap))


@halves
@HEADS
@VARIANTS
def test_attention_prefill(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, cap: float | None
) -> None:
    contexts, lengths = [1, 63, 6, 130], [1, 63, 0, 71]
    paged = Paged(contexts, heads, dtype, 16)
    query = torch.randn(sum(lengths), heads[0], heads[2]).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    actual = kernels.attention_prefill(
        query,
        paged.cache,
        starts,
        paged.contexts,
        paged.table,
        scale=0.3,
        window=window,
        soft_cap=cap,
    )
    assert_close(actual, paged.expected(query, lengths, window, cap))


@pytest.mark.parametrize("window", [None, 20])
def test_attention_decode_of_several_tokens(window: int | None) -> None:
    paged = Paged([3, 40, 257], (6, 2, 64), torch.float32, 16)
    query = torch.randn(3, 3, 6, 64)
    actual = kernels.attention_decode(
        query, paged.cache, paged.contexts, paged.table, scale=0.3, window=window
    )
    assert_close(actual.flatten(0, 1), paged.expected(query.flatten(0, 1), [3] * 3, window, None))


@halves
def test_a_long_context_is_split_further(dtype: torch.dtype, monkeypatch: Any) -> None:
    """More tokens than MOST_SPLITS pieces of SPLIT hold: the pieces become longer."""
    from pdserve.kernels import triton_decode

    monkeypatch.setattr(triton_decode, "MOST_SPLITS", 4)
    monkeypatch.setattr(triton_decode, "SPLIT", 64)
    contexts = [500, 4097, 256, 257]
    paged = Paged(contexts, (2, 1, 64), dtype, 16)
    query = torch.randn(4, 2, 64).to(dtype)
    actual = kernels.attention_decode(query, paged.cache, paged.contexts, paged.table, scale=0.3)
    assert_close(actual, paged.expected(query, [1] * 4, None, None))


@halves
@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(
    dtype: torch.dtype, window: int | None
) -> None:
    contexts, lengths = [40, 33, 1, 600, 17], [7, 33, 1, 30, 2]
    paged = Paged(contexts, (4, 2, 64), dtype, 16)
    query = torch.randn(sum(lengths), 4, 64).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    options: dict[str, Any] = {"scale": 0.2, "window": window}
    together = kernels.attention_prefill(
        query, paged.cache, starts, paged.contexts, paged.table, **options
    )
    last = query[starts[1:] - 1]
    decoded = kernels.attention_decode(last, paged.cache, paged.contexts, paged.table, **options)
    for row, length in enumerate(lengths):
        own = slice(int(starts[row]), int(starts[row + 1]))
        context = paged.contexts[row : row + 1]
        table = paged.table[row : row + 1, : -(-contexts[row] // 16)]  # narrower, too
        alone = kernels.attention_prefill(
            query[own], paged.cache, torch.tensor([0, length]), context, table, **options
        )
        assert torch.equal(alone, together[own])
        alone = kernels.attention_decode(
            last[row : row + 1], paged.cache, context, table, **options
        )
        assert torch.equal(alone, decoded[row : row + 1])


def test_rows_of_padding_come_out_as_zeros() -> None:
    paged = Paged([5, 9], (2, 1, 64), torch.float32, 4)
    lens = torch.tensor([5, 0])
    out = kernels.attention_decode(torch.randn(2, 2, 64), paged.cache, lens, paged.table, scale=1.0)
    assert out[0].count_nonzero() > 0
    assert out[1].count_nonzero() == 0


def test_an_empty_batch_is_empty() -> None:
    cache = torch.zeros(2, 2, 4, 1, 64)
    table, contexts = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    query = torch.zeros(0, 2, 64)
    out = kernels.attention_decode(query, cache, contexts, table, scale=1.0)
    assert out.shape == query.shape
    starts = torch.zeros(1, dtype=torch.int64)
    out = kernels.attention_prefill(query, cache, starts, contexts, table, scale=1.0)
    assert out.shape == query.shape


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [[], [4], [9, 0, 3], list(range(10))], ids=len)
@pytest.mark.parametrize("shape", [(3, 2, 5, 2, 8), (1, 2, 3, 1, 7)], ids=["even", "odd"])
def test_blocks_go_out_and_come_back(
    shape: tuple[int, ...], ids: list[int], index_dtype: torch.dtype
) -> None:
    pool = torch.randn(10, *shape).half()
    block_ids = torch.tensor(ids, dtype=index_dtype)
    gathered = kernels.gather_blocks(pool, block_ids)
    assert torch.equal(gathered, pool[block_ids.long()])
    other = torch.zeros_like(pool)
    kernels.scatter_blocks(gathered, other, block_ids)
    for block in range(10):
        expected = pool[block] if block in ids else torch.zeros_like(pool[block])
        assert torch.equal(other[block], expected)


@pytest.mark.parametrize("heads", [None, (0, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("block_size", [None, 1, 2, 7, 32])
def test_blocks_with_some_heads_and_another_size(
    heads: tuple[int, int] | None, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = torch.randn(7, 2, 2, 4, 4, 6)
    ids = torch.tensor([5, 1, 6])
    gathered = kernels.gather_blocks(pool, ids, heads=heads, block_size=block_size)
    first, count = heads or (0, 4)
    for token in range(12):  # the definition, token by token
        size = block_size or 4
        mine = gathered[token // size, :, :, token % size]
        theirs = pool[ids[token // 4], :, :, token % 4, first : first + count]
        assert torch.equal(mine, theirs)
    back = torch.full_like(pool, 7.0)
    kernels.scatter_blocks(gathered, back, ids, heads=heads, block_size=block_size)
    expected = torch.full_like(pool, 7.0)
    expected[ids, ..., first : first + count, :] = pool[ids, ..., first : first + count, :]
    assert torch.equal(back, expected)
    reference(monkeypatch, "gather_blocks")
    again = kernels.gather_blocks(pool, ids, heads=heads, block_size=block_size)
    assert torch.equal(again, gathered)
    reference(monkeypatch, "scatter_blocks")
    again = torch.full_like(pool, 7.0)
    kernels.scatter_blocks(gathered, again, ids, heads=heads, block_size=block_size)
    assert torch.equal(again, back)


def test_thousands_of_blocks() -> None:
    pool = torch.arange(3000 * 4, dtype=torch.float32).view(3000, 1, 2, 1, 1, 2)
    ids = torch.randperm(3000)[:1100]
    assert torch.equal(kernels.gather_blocks(pool, ids), pool[ids])


def parameters(rows: int, **given: Any) -> dict[str, torch.Tensor]:
    """Arguments of `sample`: the given ones, one value for all rows or a tensor, and defaults."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    values = {**defaults, "seeds": torch.arange(rows), "positions": 7, **given}
    return {
        name: value if isinstance(value, torch.Tensor) else torch.full((rows,), value)
        for name, value in values.items()
    }


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1, "temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05, "temperature": 0.5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
    {"top_k": 10_000},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 17, 500, 4099])
def test_seeded_tokens_are_those_of_the_reference(
    vocab: int, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 6
    logits = torch.randn(rows, vocab + 3)[:, :vocab] * 2
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,))
    positions = torch.tensor([0, 1, 2**31, 2**33 + 5, 17, 2**40])
    arguments = parameters(rows, seeds=seeds, positions=positions, **filters)
    drawn = kernels.sample(logits, **arguments)
    if not filters:
        assert drawn.tolist() == kernels.sample(logits, **arguments, filtered=False).tolist()
    reference(monkeypatch, "sample")
    assert drawn.tolist() == kernels.sample(logits, **arguments).tolist()


def test_rows_with_different_wishes_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(12, 700)
    logits[:, 5::2] = -math.inf  # forbidden by a grammar, say
    arguments = parameters(
        12,
        temperature=torch.rand(12) + 0.3,
        top_k=torch.tensor([0, 3, 600, 0] * 3),
        top_p=torch.tensor([1.0, 0.9, 0.5] * 4),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.01] * 3),
    )
    drawn = kernels.sample(logits, **arguments)
    reference(monkeypatch, "sample")
    assert drawn.tolist() == kernels.sample(logits, **arguments).tolist()


def test_equals_of_the_last_kept_token_are_kept_too() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]).expand(60, -1)
    drawn = kernels.sample(logits, **parameters(60, top_k=2))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "filters",
    [{}, pytest.param({"top_k": 12, "top_p": 0.9}, marks=pytest.mark.slow)],
    ids=str,
)
def test_draws_follow_the_distribution(filters: dict[str, Any]) -> None:
    draws = 250
    logits = torch.randn(21) * 1.5
    chances = logits.double().softmax(-1)
    if filters:
        order = chances.argsort(descending=True)[:12]
        kept = chances[order] / chances[order].sum()
        count = int((kept.cumsum(0) < 0.9).sum()) + 1
        chances = torch.zeros_like(chances).index_put((order[:count],), kept[:count])
        chances /= chances.sum()
    drawn = kernels.sample(logits.expand(draws, -1), **parameters(draws, **filters))
    counts = drawn.bincount(minlength=21).double()
    assert counts[chances == 0].sum() == 0
    possible = chances > 0
    wanted = chances[possible] * draws
    statistic = ((counts[possible] - wanted).square() / wanted).sum().item()
    freedom = int(possible.sum()) - 1
    cube = 2 / (9 * freedom)  # Wilson and Hilferty's upper 1e-4 quantile; the seeds are fixed
    assert statistic < freedom * (1 - cube + 3.72 * math.sqrt(cube)) ** 3


def test_penalties_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 500)
    entries = torch.randperm(1500)[:300]
    arguments: dict[str, Any] = {
        "rows": entries // 500,
        "token_ids": entries % 500,
        "counts": torch.randint(0, 4, (300,)),
        "presence": torch.tensor([0.5, 0.0, -1.0]),
        "frequency": torch.tensor([0.0, 0.3, 0.7]),
        "repetition": torch.tensor([1.0, 1.5, 0.8]),
    }
    mine, theirs = logits.clone(), logits.clone()
    kernels.apply_penalties(mine, **arguments)
    reference(monkeypatch, "apply_penalties")
    kernels.apply_penalties(theirs, **arguments)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.equal(mine, logits)


@pytest.mark.parametrize("vocab", [1, 32, 63, 4097])
def test_bitmasks_forbid_tokens(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, vocab)
    words = (vocab + 31) // 32
    bitmask = torch.randint(-(2**31), 2**31, (2, words)).to(torch.int32)
    expected = logits.clone()
    for entry, row in enumerate([3, 1]):
        for token in range(vocab):
            if not (int(bitmask[entry, token // 32]) >> (token % 32)) & 1:
                expected[row, token] = -math.inf
    mine = logits.clone()
    kernels.apply_bitmask(mine, torch.tensor([3, 1]), bitmask)
    assert torch.equal(mine, expected)
    reference(monkeypatch, "apply_bitmask")
    kernels.apply_bitmask(logits, torch.tensor([3, 1]), bitmask)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("rows", "vocab", "top"),
    [(0, 9, 3), (1, 1, 1), (3, 4097, 20), (2, 5, 9), (3, 4160, 20), (0, 4160, 2)],
)
def test_log_probabilities(rows: int, vocab: int, top: int) -> None:
    logits = torch.randn(rows, vocab) * 4
    tokens = torch.randint(0, vocab, (rows,))
    own, rank, ids, values = kernels.log_probabilities(logits, tokens, top)
    exact = logits.double().log_softmax(-1)
    picked = logits.gather(1, tokens.unsqueeze(1))
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    expected = exact.gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(own.double(), expected, **near)
    assert torch.equal(rank, (logits > picked).sum(1) + 1)
    best = exact.topk(min(top, vocab))
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(values.double(), best.values, **near)


@pytest.mark.parametrize("operation", ["attention_decode", "attention_prefill"])
def test_heads_that_are_too_large_are_refused_with_a_sentence(operation: str) -> None:
    query, cache = torch.zeros(1, 1, 257), torch.zeros(1, 2, 16, 1, 257)
    lens, table = torch.tensor([1]), torch.tensor([[0]])
    arguments = (query, cache, lens, table)
    if operation == "attention_prefill":
        arguments = (query, cache, torch.tensor([0, 1]), lens, table)
    with pytest.raises(kernels.KernelError, match="heads of up to 256, not of 257"):
        getattr(kernels, operation)(*arguments, scale=1.0)
