"""The operations that `bench.kernels` measures: their inputs, their work, torch's own way.

A case's inputs are made when its turn comes, and freed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from pdserve import kernels

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size."""

    name: str
    run: Run
    nbytes: float = 0.0
    """Bytes that must move, for operations bound by memory."""
    flops: float = 0.0
    """Operations that must be computed, for those bound by arithmetic."""
    torch_run: Run | None = None
    """torch's own way to the same result."""
    compare: bool = True
    """Whether the result is to be near the reference's (tokens must be equal)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the cases are."""

    rows: int
    hidden: int
    batch: int
    context: int
    prompt: int
    vocab: int
    blocks: int
    layers: int


LARGE = Sizes(4096, 4096, 64, 4096, 4096, 151_936, 512, 36)
SMALL = Sizes(32, 512, 4, 200, 128, 8192, 8, 4)


def cases(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every operation, its inputs made when its turn comes."""
    yield from pointwise(size, device, dtype)
    yield from attention(size, device, dtype)
    yield from blocks(size, device, dtype)
    yield from sampling(size, device)
    yield from quantized(size, device, dtype)


def pointwise(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    rows, hidden = size.rows, size.hidden
    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=device).to(dtype)
    yield Case(
        name=f"rms_norm {rows} x {hidden}",
        run=lambda: kernels.rms_norm(x, weight, 1e-6),
        nbytes=2 * x.nbytes,
        torch_run=lambda: functional.rms_norm(x, weight.shape, weight, 1e-6),
    )
    yield Case(
        name=f"fused_add_rms_norm {rows} x {hidden}",
        run=lambda: kernels.fused_add_rms_norm(x, residual, weight, 1e-6),
        nbytes=4 * x.nbytes,
        torch_run=lambda: functional.rms_norm(x + residual, weight.shape, weight, 1e-6),
    )
    for name, run, own in (
        ("silu_and_mul", kernels.silu_and_mul, functional.silu),
        ("gelu_and_mul", kernels.gelu_and_mul, functional.gelu),
    ):
        yield Case(
            name=f"{name} {rows} x {hidden}",
            run=lambda run=run: run(x, residual),  # type: ignore[misc]
            nbytes=3 * x.nbytes,
            torch_run=lambda own=own: own(x) * residual,  # type: ignore[misc]
        )
    heads, dim, block = hidden // 128, 128, 16
    query = torch.randn(rows, heads, dim, device=device).to(dtype)
    key, value = (
        torch.randn(rows, max(1, heads // 4), dim, device=device).to(dtype) for _ in range(2)
    )
    cos, sin = (torch.randn(rows, dim // 2, device=device) for _ in range(2))
    shape = (-(-rows // block) + 1, 2, block, max(1, heads // 4), dim)
    cache = torch.zeros(shape, device=device, dtype=dtype)
    slots = torch.randperm(shape[0] * block, device=device)[:rows]
    yield Case(
        name=f"rope {rows} x {heads} x {dim}",
        run=lambda: kernels.rope(query, cos, sin),
        nbytes=2 * query.nbytes + 2 * cos.nbytes,
    )

    def store() -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.rope_and_store_kv(query, key, value, cos, sin, cache, slots), cache

    yield Case(
        name=f"rope_and_store_kv {rows} x {heads} x {dim}",
        run=store,
        nbytes=2 * (query.nbytes + key.nbytes + value.nbytes) + 2 * cos.nbytes,
    )


def attention(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    heads, kv_heads, dim, block = 32, 4, 128, 16
    batch, context = size.batch, size.context
    for window in (None, context // 2):
        width = -(-context // block)
        shape = (batch * width, 2, block, kv_heads, dim)
        cache = torch.randn(shape, device=device).to(dtype)
        table = torch.randperm(batch * width, device=device).view(batch, width)
        lens = torch.full((batch,), context, device=device)
        query = torch.randn(batch, heads, dim, device=device).to(dtype)
        plain = torch.randn(2, batch, kv_heads, context, dim, device=device).to(dtype)
        seen = context if window is None else window
        yield Case(
            name=f"attention_decode {batch} x {context}" + (f" window {window}" if window else ""),
            run=lambda query=query, cache=cache, lens=lens, table=table, window=window: (  # type: ignore[misc]
                kernels.attention_decode(query, cache, lens, table, scale=0.09, window=window)
            ),
            nbytes=cache.nbytes * seen / context,
            torch_run=None
            if window
            else lambda query=query, plain=plain: functional.scaled_dot_product_attention(  # type: ignore[misc]
                query.unsqueeze(2), plain[0], plain[1], enable_gqa=True
            ),
        )
    for prompt in (size.prompt, 4 * size.prompt):
        width = -(-prompt // block)
        cache = torch.randn(width, 2, block, kv_heads, dim, device=device).to(dtype)
        table = torch.randperm(width, device=device).view(1, width)
        query = torch.randn(prompt, heads, dim, device=device).to(dtype)
        starts, lens = torch.tensor([0, prompt], device=device), torch.tensor([prompt]).to(device)
        plain = torch.randn(2, 1, kv_heads, prompt, dim, device=device).to(dtype)
        rows = query.transpose(0, 1).unsqueeze(0)
        yield Case(
            name=f"attention_prefill {prompt}",
            run=lambda query=query, cache=cache, starts=starts, lens=lens, table=table: (  # type: ignore[misc]
                kernels.attention_prefill(query, cache, starts, lens, table, scale=0.09)
            ),
            flops=4 * heads * dim * prompt * (prompt + 1) / 2,
            torch_run=lambda rows=rows, plain=plain: functional.scaled_dot_product_attention(  # type: ignore[misc]
                rows, plain[0], plain[1], is_causal=True, enable_gqa=True
            ),
        )


def blocks(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    pool = torch.randn(2 * size.blocks, size.layers, 2, 16, 8, 128, device=device).to(dtype)
    ids = torch.randperm(2 * size.blocks, device=device)[: size.blocks]
    for heads in (None, (0, 4)):
        buffer = kernels.gather_blocks(pool, ids, heads=heads)
        named = "" if heads is None else " half of the heads"
        yield Case(
            name=f"gather_blocks {size.blocks}{named}",
            run=lambda heads=heads, buffer=buffer: (  # type: ignore[misc]
                kernels.gather_blocks(pool, ids, buffer, heads=heads)
            ),
            nbytes=2 * buffer.nbytes,
            torch_run=None if heads else lambda: pool.index_select(0, ids),
        )
        yield Case(
            name=f"scatter_blocks {size.blocks}{named}",
            run=lambda heads=heads, buffer=buffer: (  # type: ignore[misc]
                kernels.scatter_blocks(buffer, pool, ids, heads=heads)
            ),
            nbytes=2 * buffer.nbytes,
            compare=False,  # gather reads back what it wrote
        )


def sampling(size: Sizes, device: str) -> Iterator[Case]:
    rows = size.batch
    logits = torch.randn(rows, size.vocab, device=device) * 2

    def column(value: float) -> torch.Tensor:
        return torch.full((rows,), value, device=device)

    for name, top_k, top_p in (("", 0, 1.0), (" top-k 50, top-p 0.9", 50, 0.9)):
        arguments: dict[str, torch.Tensor] = {
            "temperature": column(0.8),
            "top_k": torch.full((rows,), top_k, device=device),
            "top_p": column(top_p),
            "min_p": column(0.0),
            "seeds": torch.arange(rows, device=device),
            "positions": torch.arange(rows, device=device),
        }
        yield Case(
            name=f"sample {rows} x {size.vocab}{name}",
            run=lambda arguments=arguments: kernels.sample(logits, **arguments),  # type: ignore[misc]
            nbytes=logits.nbytes,
            torch_run=lambda: logits.softmax(-1).multinomial(1),
        )
    tokens = logits.argmax(-1)
    yield Case(
        name=f"log_probabilities {rows} x {size.vocab}, top 20",
        run=lambda: kernels.log_probabilities(logits, tokens, 20)[0],
        nbytes=logits.nbytes,
        torch_run=lambda: logits.log_softmax(-1),
    )


def quantized(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """One token, a batch of tokens, a chunk of prompts; torch multiplies by the dense matrix."""
    rows, columns = 2 * size.hidden, size.hidden
    dense = torch.randn(rows, columns, device=device).to(dtype)
    weights = {"int8": kernels.quantize(dense, "int8"), "fp8": kernels.quantize(dense, "fp8")}
    for packing in ("awq", "gptq"):
        awq = packing == "awq"
        shape = (columns, rows // 8) if awq else (columns // 8, rows)
        weights[packing] = kernels.QuantizedWeight(
            packing="awq" if awq else "gptq",
            values=torch.randint(-(1 << 31), 1 << 31, shape, device=device).int(),
            zeros=torch.randint(-(1 << 31), 1 << 31, (columns // 128, rows // 8)).int().to(device),
            scales=torch.rand(columns // 128, rows, device=device).half(),
            group=128,
            columns=columns,
        )
    for name, weight in weights.items():
        for tokens in (1, size.batch, size.rows):
            x = torch.randn(tokens, columns, device=device).to(dtype)
            yield Case(
                name=f"quantized_linear {name} {tokens} x {columns} x {rows}",
                run=lambda x=x, weight=weight: kernels.quantized_linear(x, weight),  # type: ignore[misc]
                nbytes=0.0 if tokens > 512 else weight.nbytes + x.nbytes * (1 + rows / columns),
                flops=2 * tokens * rows * columns if tokens > 512 else 0.0,
                torch_run=lambda x=x: functional.linear(x, dense),  # type: ignore[misc]
            )
