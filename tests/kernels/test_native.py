"""The C kernels against float64: odd sizes, poisoned memory, bits alone and in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import native
from pdserve.kernels.checks import KernelError
from pdserve.kernels.rope import default_frequencies, rope_table

FLOATS = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
VARIANTS = ("-march=native", "-march=x86-64-v3", "-march=x86-64", "-march=x86-64-v4")

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or the C kernels are switched off"
)


@pytest.fixture(params=VARIANTS, scope="module", autouse=True)
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Every test runs on every instruction set that this machine can compile for and execute."""
    flag: str = request.param
    features = native._processor()
    if flag != "-march=native" and b"x86_64" not in features:
        pytest.skip("x86-64 only")
    if (flag.endswith("v3") and b"avx2" not in features) or (
        flag.endswith("v4") and b"avx512dq" not in features
    ):
        pytest.skip(f"this processor cannot run {flag}")
    patch = pytest.MonkeyPatch()
    patch.setattr(native.compiled, "__defaults__", ((flag,), tmp_path_factory.mktemp("native")))
    native.library.cache_clear()
    assert native.library() is not None
    yield
    patch.undo()
    native.library.cache_clear()


def close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    assert not actual.isnan().any()
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE[actual.dtype] * scale * max(1.0, expected.abs().max().item()), error


# Products


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 64), (129, 352), (2, 1000)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_exact_to_rounding(
    dtype: torch.dtype, rows: int, columns: int, bias: bool
) -> None:
    weight = (torch.randn(rows, columns) / math.sqrt(columns)).to(dtype)
    offset = torch.randn(rows).to(dtype) if bias else None
    for tokens in (*range(1, 12), 31, 32, 64):
        x = torch.randn(tokens, columns).to(dtype)
        expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        close(native.linear(x, weight, offset), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(dtype: torch.dtype) -> None:
    weight, x = torch.randn(301, 200).to(dtype), torch.randn(32, 200).to(dtype)
    whole = native.linear(x, weight, None)
    for tokens in range(1, 32):
        assert torch.equal(native.linear(x[:tokens], weight, None), whole[:tokens])
    assert torch.equal(native.linear(x[17:18], weight, None), whole[17:18])
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(20):
                assert torch.equal(native.linear(x, weight, None), whole)
    finally:
        torch.set_num_threads(1)


def test_weights_read_nothing_beyond_their_end() -> None:
    """What lies behind the last row, and behind the last column, takes no part."""
    memory = torch.full((8, 40), float("nan"))
    memory.view(-1)[: 5 * 37] = 1.0
    weight = memory.view(-1)[: 5 * 37].view(5, 37)
    result = native.linear(torch.ones(3, 37), weight, None)
    assert torch.equal(result, torch.full((3, 5), 37.0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nan_come_through(dtype: torch.dtype) -> None:
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [1.0, 1.0]]).to(dtype)
    result = native.linear(x, torch.ones(3, 2, dtype=dtype), None)
    assert result[0].isinf().all() and result[1].isnan().all() and (result[2] == 2).all()


def test_the_public_product_takes_many_rows_other_types_and_views() -> None:
    weight = torch.randn(24, 16)
    for x in (torch.randn(100, 16), torch.randn(5, 32)[:, ::2], torch.randn(0, 16)):
        close(kernels.linear(x, weight), x.double() @ weight.double().T)
    columns = torch.randn(16, 24).T
    close(kernels.linear(torch.ones(2, 16), columns), columns.double().sum(1).expand(2, -1))
    half = torch.ones(2, 16, dtype=torch.float16)
    assert (kernels.linear(half, half) == 16).all()
    with pytest.raises(KernelError, match="weight is float32"):
        kernels.linear(half, weight)


# Attention


def pool(
    dtype: torch.dtype, lens: list[int], heads: int, dim: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned cache between other layers, with the sequences' blocks in random order."""
    width = -(-max(lens) // block) + 1
    cache = torch.full((len(lens) * width + 3, 3, 2, block, heads, dim), float("nan"), dtype=dtype)
    order = torch.randperm(cache.shape[0])
    table = order[: len(lens) * width].view(len(lens), width)
    for row, length in enumerate(lens):
        for token in range(length):
            where = cache[table[row, token // block], 1]
            where[:, token % block] = torch.randn(2, heads, dim).to(dtype)
    return cache[:, 1], table


def attention64(
    query: torch.Tensor,
    cache: torch.Tensor,
    length: int,
    blocks: torch.Tensor,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """One sequence, by the formula: query [Hq, D] → [Hq, D] float64."""
    tokens = cache[blocks].transpose(1, 2).flatten(0, 1)[:length].double()
    tokens = tokens[0 if window is None else max(0, length - window) :]
    group = query.shape[0] // cache.shape[3]
    key, value = (tokens[:, n].repeat_interleave(group, 1) for n in (0, 1))
    scores = torch.einsum("hd,chd->hc", query.double(), key) * 0.2
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.einsum("hc,chd->hd", scores.softmax(-1), value)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "block"),
    [(1, 1, 16, 1), (2, 4, 80, 16), (3, 2, 64, 5), (1, 7, 256, 8)],
)
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (20, None), (None, 1.5), (1, 2.0)])
def test_attention_is_exact_to_rounding(
    dtype: torch.dtype,
    heads: int,
    group: int,
    dim: int,
    block: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    lens = [1, 5, 31, 32, 33, 77]
    cache, table = pool(dtype, lens, heads, dim, block)
    query = torch.randn(len(lens), heads * group, dim).to(dtype)
    result = native.attention_decode(
        query, cache, torch.tensor(lens), table, scale=0.2, window=window, soft_cap=soft_cap
    )
    for row, length in enumerate(lens):
        expected = attention64(query[row], cache, length, table[row], window, soft_cap)
        close(result[row], expected)
        alone = native.attention_decode(
            query[row : row + 1],
            cache,
            torch.tensor([length], dtype=torch.int32),
            table[row : row + 1, : -(-length // block)].int(),
            scale=0.2,
            window=window,
            soft_cap=soft_cap,
        )
        assert torch.equal(alone[0], result[row])


def test_attention_refuses_what_lies_outside() -> None:
    cache, table = pool(torch.float32, [8, 8], 2, 16, 4)
    query = torch.randn(2, 4, 16)
    for lens, blocks, sentence in (
        ([8, 99], table, "block_table has room for 12 tokens, the context has 99"),
        ([8, 8], table + 100, "outside the block table"),
        ([8, -1], table, "outside the block table"),
    ):
        with pytest.raises(KernelError, match=sentence):
            native.attention_decode(query, cache, torch.tensor(lens), blocks, scale=1.0)
    padded = native.attention_decode(query, cache, torch.tensor([0, 8]), table, scale=1.0)
    assert not padded[0].any() and padded[1].any()


def test_large_scores_do_not_overflow() -> None:
    cache, table = pool(torch.float32, [50], 1, 16, 8)
    query = torch.randn(1, 2, 16) * 1e4
    result = native.attention_decode(query, cache, torch.tensor([50]), table, scale=0.2)
    close(result[0], attention64(query[0], cache, 50, table[0], None, None))


# Logits


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 1, 1), (3, 77, 33), (32, 200, 72)])
def test_logits(dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> None:
    x, norm = torch.randn(rows, hidden).to(dtype), torch.rand(hidden).to(dtype)
    weight = (torch.randn(vocab, hidden) / math.sqrt(hidden)).to(dtype)
    found = kernels.logits(x, norm, weight, 1e-5)
    assert found.dtype is torch.float32
    assert torch.equal(found, found.to(dtype).float())
    expected = kernels.rms_norm(x, norm, 1e-5).double() @ weight.double().T
    close(found.to(dtype), expected)
    for row in range(rows):
        assert torch.equal(kernels.logits(x[row : row + 1], norm, weight, 1e-5)[0], found[row])


def test_the_most_likely_is_the_first_of_equals_and_nan_wins() -> None:
    for vocab in (1, 5, 16, 33, 4096):
        logits = torch.randint(-3, 4, (9, vocab)).float()
        logits[1] = -math.inf
        logits[2, vocab // 2 :] = -math.inf
        logits[3, vocab // 3] = math.nan
        logits[4, -1] = math.nan
        logits[5, vocab // 2] = math.inf
        assert kernels.greedy(logits).tolist() == [
            next(i for i, x in enumerate(row) if x != x or (x == max(row) and not nan))
            for row in logits.tolist()
            for nan in [any(x != x for x in row)]
        ]


# The whole step


def layer(dtype: torch.dtype, extras: bool, window: int | None) -> kernels.LayerTensors:
    """E 72, 4 query and 2 KV heads of 24, I 100; extras: biases and head norms."""

    def product(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = torch.randn(rows).to(dtype) if extras else None
        return (torch.randn(rows, columns) / math.sqrt(columns)).to(dtype), bias

    norms = (torch.randn(24).to(dtype), torch.randn(24).to(dtype)) if extras else None
    return kernels.LayerTensors(
        attention_norm=torch.rand(72).to(dtype),
        mlp_norm=torch.rand(72).to(dtype),
        head_norms=norms,
        query=product(96, 72),
        key=product(48, 72),
        value=product(48, 72),
        output=product(72, 96),
        gate=product(100, 72),
        up=product(100, 72),
        down=product(72, 100),
        window=window,
    )


def reference(
    layers: list[kernels.LayerTensors],
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    caches: list[torch.Tensor],
    slots: torch.Tensor,
    lens: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """The same from this package's references, in float64 where they can."""

    def product(x: torch.Tensor, item: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        result = x.double() @ item[0].double().T
        return (result if item[1] is None else result + item[1].double()).to(x.dtype)

    for item, cache in zip(layers, caches, strict=True):
        normed = kernels.rms_norm(x, item.attention_norm, 1e-5)
        query, key, value = (
            product(normed, part).unflatten(-1, (-1, 24))
            for part in (item.query, item.key, item.value)
        )
        if item.head_norms is not None:
            query = kernels.rms_norm(query, item.head_norms[0], 1e-5)
            key = kernels.rms_norm(key, item.head_norms[1], 1e-5)
        query = kernels.rope_and_store_kv(query, key, value, *angles, cache, slots)
        mixed = kernels.attention_decode(
            query, cache, lens, table, scale=24**-0.5, window=item.window
        )
        x = x + product(mixed.flatten(1), item.output)
        normed = kernels.rms_norm(x, item.mlp_norm, 1e-5)
        inner = kernels.silu_and_mul(product(normed, item.gate), product(normed, item.up))
        x = x + product(inner, item.down)
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_a_step_is_what_the_references_compute(
    dtype: torch.dtype, extras: bool, tokens: int
) -> None:
    layers = [layer(dtype, extras, None), layer(dtype, extras, 6)]
    lens = [1 + 7 * row for row in range(tokens)]
    pools = [pool(dtype, lens, 2, 24, 8) for _ in layers]
    table = pools[0][1]
    # Both layers share the block table; the second cache is filled through it.
    caches = [pools[0][0], pools[0][0].clone()]
    positions = torch.tensor(lens) - 1
    slots = table[torch.arange(tokens), positions // 8] * 8 + positions % 8
    cos, sin = rope_table(default_frequencies(24, 100.0), torch.arange(80))
    x = torch.randn(tokens, 72).to(dtype)
    theirs = [cache.clone() for cache in caches]
    angles = (cos[positions], sin[positions])
    expected = reference(layers, x, angles, theirs, slots, torch.tensor(lens), table)
    step = kernels.DecodeStep(layers, cos=cos, sin=sin, eps=1e-5)
    contiguous = [cache.clone(memory_format=torch.contiguous_format) for cache in caches]

    def run(rows: slice) -> torch.Tensor:
        hidden = x[rows].clone()
        step(
            hidden,
            contiguous,
            positions=positions[rows].contiguous(),
            slots=slots[rows].contiguous(),
            context_lens=torch.tensor(lens[rows]),
            block_table=table[rows].contiguous(),
        )
        return hidden

    hidden = run(slice(None))
    close(hidden, expected.double(), scale=4)
    for mine, other in zip(contiguous, theirs, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
        close(mine.nan_to_num(), other.nan_to_num().double(), scale=4)
    for row in range(tokens):
        assert torch.equal(run(slice(row, row + 1))[0], hidden[row])
    try:
        torch.set_num_threads(2)
        for _ in range(20):
            assert torch.equal(run(slice(None)), hidden)
    finally:
        torch.set_num_threads(1)


def test_padding_touches_no_cache_and_no_other_row() -> None:
    layers = [layer(torch.float32, False, None)]
    cache, table = pool(torch.float32, [9, 9], 2, 24, 8)
    cos, sin = rope_table(default_frequencies(24, 100.0), torch.arange(16))
    step = kernels.DecodeStep(layers, cos=cos, sin=sin, eps=1e-5)
    hidden = torch.randn(2, 72)
    results = []
    for slots in ([int(table[0, 1]) * 8, -1], [int(table[0, 1]) * 8]):
        rows, mine = hidden[: len(slots)].clone(), cache.clone()
        step(
            rows,
            [mine],
            positions=torch.tensor([8, 0][: len(slots)]),
            slots=torch.tensor(slots),
            context_lens=torch.tensor([9, 0][: len(slots)]),
            block_table=table[: len(slots)].contiguous(),
        )
        results.append((rows[0], mine.nan_to_num()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_step_refuses_slots_and_positions_outside() -> None:
    layers = [layer(torch.float32, False, None)]
    cache, table = pool(torch.float32, [3], 2, 24, 8)
    cos, sin = rope_table(default_frequencies(24, 100.0), torch.arange(4))
    step = kernels.DecodeStep(layers, cos=cos, sin=sin, eps=1e-5)
    for position, slot in ((4, 0), (-1, 0), (0, 10**9)):
        with pytest.raises(KernelError, match="rope table"):
            step(
                torch.zeros(1, 72),
                [cache],
                positions=torch.tensor([position]),
                slots=torch.tensor([slot]),
                context_lens=torch.tensor([3]),
                block_table=table,
            )


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_padding_are_neither_stored_nor_read(dtype: torch.dtype) -> None:
    """Slot -1 and a context of 0, before, between and behind the others: those have the same bits
    as without, and the cache differs nowhere else."""
    layers = [layer(dtype, True, None), layer(dtype, True, 3)]
    lens = [5, 9, 17]
    cache, table = pool(dtype, lens, 2, 24, 8)
    plain = [cache.clone(memory_format=torch.contiguous_format) for _ in layers]
    padded = [tensor.clone() for tensor in plain]
    positions = torch.tensor(lens) - 1
    slots = table[torch.arange(3), positions // 8] * 8 + positions % 8
    cos, sin = rope_table(default_frequencies(24, 100.0), torch.arange(80))
    step = kernels.DecodeStep(layers, cos=cos, sin=sin, eps=1e-5)
    hidden = torch.randn(3, 72).to(dtype)
    rows = torch.tensor([1, 3, 4])
    wide = torch.full((6, 72), math.nan, dtype=dtype)  # whatever padding holds stays in its row
    wide[rows] = hidden
    columns = {
        "positions": torch.zeros(6, dtype=torch.int64).index_put((rows,), positions),
        "slots": torch.full((6,), -1).index_put((rows,), slots),
        "context_lens": torch.zeros(6, dtype=torch.int64).index_put((rows,), torch.tensor(lens)),
        "block_table": torch.full((6, table.shape[1]), -7).index_put((rows,), table),
    }
    step(
        hidden,
        plain,
        positions=positions,
        slots=slots,
        context_lens=torch.tensor(lens),
        block_table=table,
    )
    step(wide, padded, **columns)
    assert torch.equal(wide[rows], hidden)
    for mine, other in zip(padded, plain, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0))
        assert torch.equal(mine.isnan(), other.isnan())
