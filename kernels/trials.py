"""What `pdserve.kernels.tuning` runs: every operation that has a choice, on the real pool, at the
sizes of the model. The pool's first blocks are written and zeroed again: before anyone owns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pdserve.kernels import dispatch
from pdserve.kernels.attention import attention_decode, attention_prefill
from pdserve.kernels.blocks import gather_blocks, scatter_blocks
from pdserve.kernels.checks import FLOAT8
from pdserve.kernels.configs import attention_class
from pdserve.kernels.experts import expert_weights, mixture, route
from pdserve.kernels.linear import linear
from pdserve.kernels.sampling import sample
from pdserve.kernels.tuning import Run, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the sizes of a trial follow from."""

    dtype: torch.dtype
    """Of the activations."""
    heads: int
    """Query heads."""
    hidden_size: int
    vocab_size: int
    invariant: bool = False
    """Whether products run in our own kernel."""
    experts: int = 0
    """Of a mixture; 0: there is none."""
    active: int = 0
    """Experts per token."""
    inner_size: int = 0
    """Of an expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much a trial computes, at most."""

    prompt: int = 2048
    """Tokens of a chunk: the last of a long prompt, behind three times as many."""
    sequences: int = 32
    context: int = 2048
    blocks: int = 256
    rows: int = 64
    experts: int = 16
    nbytes: int = 256 << 20
    """Of the blocks that are copied."""
    pool: int = 4096
    """Blocks of the pool that are written."""


def trials(pool: torch.Tensor, model: Model, sizes: Sizes | None = None) -> Iterator[Trial]:
    """pool: [N, L, 2, S, H, D], owned by nobody. Each trial is to be run before the next is asked
    for; the blocks are zeroed when the last one is over."""
    sizes = sizes or Sizes()
    if pool.shape[0] == 0:
        return
    used = min(pool.shape[0], -(-sizes.context // pool.shape[3]) * sizes.sequences, sizes.pool)
    pool = pool[:used]
    layer = pool[:, 0]
    noise = torch.randn(layer.shape, device=pool.device, dtype=torch.float32)
    layer.copy_(noise.clamp_(-3, 3).to(pool.dtype))
    try:
        yield from _attention(layer, model, sizes)
        yield from _copies(pool, sizes)
        if model.invariant:
            x, weight = (
                torch.randn(rows, model.hidden_size, device=pool.device).to(model.dtype)
                for rows in (sizes.rows, model.hidden_size)
            )
            wide = " wide" if model.dtype == torch.float32 else ""
            yield Trial("linear" + wide, (), lambda: linear(x, weight, invariant=True))
        if model.experts:
            yield _mixture(pool.device, model, sizes)
        yield _sampling(pool.device, model, sizes)
    finally:
        pool.view(torch.uint8).zero_()


def _attention(cache: torch.Tensor, model: Model, sizes: Sizes) -> Iterator[Trial]:
    blocks, _, size, _, dim = cache.shape
    device = cache.device
    prompt = min(sizes.prompt, blocks * size)
    until = min(4 * prompt, blocks * size)
    query = torch.randn(prompt, model.heads, dim, device=device).to(model.dtype)
    if dispatch.implementation("attention_decode", query, cache) is None:
        return  # a GPU that is too old for the cache's type
    wide, shape = attention_class(query, cache)
    table = torch.randperm(blocks, device=device)
    starts, length = (torch.tensor(n, device=device) for n in ([0, prompt], [until]))
    yield Trial(
        "attention_prefill" + wide,
        shape,
        lambda: attention_prefill(query, cache, starts, length, table[None], scale=dim**-0.5),
    )
    width = min(-(-sizes.context // size), blocks)
    places = torch.arange(sizes.sequences * width, device=device) % blocks
    rows = table[places].view(sizes.sequences, width)
    lens = torch.full((sizes.sequences,), width * size, device=device)
    last = query[torch.arange(sizes.sequences, device=device) % prompt]
    yield Trial(
        "attention_decode" + wide,
        shape,
        lambda: attention_decode(last, cache, lens, rows, scale=dim**-0.5),
    )


def _copies(pool: torch.Tensor, sizes: Sizes) -> Iterator[Trial]:
    count = min(sizes.blocks, max(1, sizes.nbytes // pool[0].nbytes))
    ids = torch.randperm(pool.shape[0], device=pool.device)[:count]
    formats: tuple[str | None, ...] = (None, "int8")
    if pool.dtype == FLOAT8:
        pool, formats = pool.view(torch.uint8), (None,)
    shape, device = (count, *pool.shape[1:]), pool.device
    if pool.is_floating_point():
        content = torch.randn(shape, device=device, dtype=pool.dtype)
    else:
        content = torch.randint(256, shape, device=device, dtype=pool.dtype)
    pool.index_copy_(0, ids, content)
    del content
    for wire in formats:
        buffer = gather_blocks(pool, ids, wire=wire)

        def gather(buffer: torch.Tensor = buffer, wire: str | None = wire) -> torch.Tensor:
            return gather_blocks(pool, ids, buffer, wire=wire)

        def scatter(buffer: torch.Tensor = buffer, wire: str | None = wire) -> torch.Tensor:
            scatter_blocks(buffer, pool, ids, wire=wire)
            return buffer

        def scattered(scatter: Run = scatter) -> torch.Tensor:
            pool.zero_()
            scatter()
            return pool.index_select(0, ids)

        yield Trial("pack_blocks" if wire else "gather_blocks", (), gather)
        yield Trial("unpack_blocks" if wire else "scatter_blocks", (), scatter, scattered)


def _mixture(device: torch.device, model: Model, sizes: Sizes) -> Trial:
    """With at most `Sizes.experts` of the model's experts."""
    count, inner, hidden = min(model.experts, sizes.experts), model.inner_size, model.hidden_size
    made = [
        tuple(
            (torch.randn(shape, device=device) / shape[1] ** 0.5).to(model.dtype)
            for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
        )
        for _ in range(count)
    ]
    held = expert_weights([(gate, up, down) for gate, up, down in made])
    x, logits = (torch.randn(sizes.rows, n, device=device).to(model.dtype) for n in (hidden, count))
    weights, experts = route(logits, min(model.active, count), renormalise=True)
    return Trial(
        "mixture wide" if model.dtype == torch.float32 else "mixture",
        (),
        lambda: mixture(x, weights, experts, held, "silu"),
    )


def _sampling(device: torch.device, model: Model, sizes: Sizes) -> Trial:
    rows = sizes.rows
    logits = torch.randn(rows, model.vocab_size, device=device) * 2
    ones, none = (torch.full((rows,), value, device=device) for value in (1.0, 0.0))
    numbers = torch.arange(rows, device=device)
    return Trial(
        "sample",
        (),
        lambda: sample(
            logits,
            temperature=ones,
            top_k=torch.zeros_like(numbers),
            top_p=ones,
            min_p=none,
            seeds=numbers,
            positions=numbers,
        ),
    )
