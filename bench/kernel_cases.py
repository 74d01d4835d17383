"""The operations that `bench.kernels` measures: their inputs, their work, torch's own way.

A group yields its cases one by one and makes their inputs when their turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    torch_others: Sequence[Run] = ()
    """More of its ways; some may not exist on this machine. The fastest of all counts."""
    compare: bool = True
    """Whether the result is to be near the reference's (tokens must be equal)."""
    choose: str = ""
    """What PDSERVE_KERNELS says while it runs, where another implementation than the chosen one is
    meant."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the cases are."""

    rows: int
    """Of operations bound by memory: enough that a launch's own few microseconds do not matter."""
    tokens: int
    """Of products."""
    hidden: int
    batch: int
    context: int
    prompt: int
    vocab: int
    blocks: int
    layers: int


LARGE = Sizes(16384, 4096, 4096, 64, 4096, 4096, 151_936, 512, 36)
SMALL = Sizes(32, 32, 512, 4, 200, 128, 8192, 8, 4)


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
            torch_others=own_attention(rows, plain) if device == "cuda" else (),
        )


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


def own_attention(query: torch.Tensor, plain: torch.Tensor) -> list[Run]:
    """torch's causal attention by each of its kernels, the KV heads repeated beforehand."""
    key, value = plain.repeat_interleave(query.shape[1] // plain.shape[2], 2)

    def run(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return [lambda backend=backend: run(backend) for backend in BACKENDS]  # type: ignore[misc]


def attention_float8(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Over a cache of e4m3."""
    heads, kv_heads, dim, block = 32, 4, 128, 16
    batch, context = size.batch, size.context
    width = -(-context // block)
    cache = torch.randn(batch * width, 2, block, kv_heads, dim, device=device)
    cache = cache.to(torch.float8_e4m3fn)
    table = torch.randperm(batch * width, device=device).view(batch, width)
    lens = torch.full((batch,), context, device=device)
    query = torch.randn(batch, heads, dim, device=device).to(dtype)
    scales: dict[str, Any] = {"scale": 0.09, "k_scale": 0.5, "v_scale": 2.0}
    yield Case(
        name=f"attention_decode fp8 {batch} x {context}",
        run=lambda: kernels.attention_decode(query, cache, lens, table, **scales),
        nbytes=cache.nbytes,
    )
    prompt = min(size.prompt, context)
    starts, lens_one = torch.tensor([0, prompt], device=device), lens[:1] - context + prompt
    chunk = torch.randn(prompt, heads, dim, device=device).to(dtype)
    yield Case(
        name=f"attention_prefill fp8 {prompt}",
        run=lambda: kernels.attention_prefill(chunk, cache, starts, lens_one, table[:1], **scales),
        flops=4 * heads * dim * prompt * (prompt + 1) / 2,
    )


def products(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Batch-invariant products, torch's own are not; then those of a step of few tokens."""
    rows, columns = 2 * size.hidden, size.hidden
    weight = torch.randn(rows, columns, device=device).to(dtype)
    for tokens in (1, size.batch, size.tokens):
        x = torch.randn(tokens, columns, device=device).to(dtype)
        yield Case(
            name=f"linear invariant {tokens} x {columns} x {rows}",
            run=lambda x=x: kernels.linear(x, weight, invariant=True),  # type: ignore[misc]
            nbytes=0.0 if tokens > 512 else weight.nbytes + x.nbytes * (1 + rows / columns),
            flops=2 * tokens * rows * columns if tokens > 512 else 0.0,
            torch_run=lambda x=x: functional.linear(x, weight),  # type: ignore[misc]
            # Without Triton it is computed row by row, which for many rows takes minutes.
            compare=tokens <= 64,
        )
    prompt, block = size.prompt, 16
    cache = torch.randn(-(-prompt // block), 2, block, 4, 128, device=device).to(dtype)
    table = torch.randperm(cache.shape[0], device=device).view(1, -1)
    query = torch.randn(prompt, 32, 128, device=device).to(dtype)
    starts, lens = torch.tensor([0, prompt], device=device), torch.tensor([prompt]).to(device)
    yield Case(
        name=f"attention_prefill invariant {prompt}",
        run=lambda: kernels.attention_prefill(
            query, cache, starts, lens, table, scale=0.09, invariant=True
        ),
        flops=4 * 32 * 128 * prompt * (prompt + 1) / 2,
        # Token by token, each of another length: torch makes a plan for each, which takes minutes.
        compare=prompt <= 512,
    )
    yield from step_products(size, device, dtype)


def step_products(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """In the shape of Qwen3-8B's layers: which share of a copy's bandwidth reads the weights."""
    hidden = size.hidden
    for rows, columns in ((2 * hidden, hidden), (6 * hidden, hidden), (hidden, 3 * hidden)):
        weight = torch.randn(rows, columns, device=device).div_(columns**0.5).to(dtype)
        for tokens in (1, 4, 64):
            x = torch.randn(tokens, columns, device=device).to(dtype)
            yield Case(
                name=f"linear {tokens} x {columns} x {rows}",
                run=lambda x=x, weight=weight: kernels.linear(x, weight),  # type: ignore[misc]
                nbytes=weight.nbytes + x.nbytes * (1 + rows / columns),
                compare=device == "cpu",  # on CUDA it is torch's own product
            )


def experts(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Routing and mixtures in the shape of Qwen3-30B-A3B's layers: 128 experts, 8 for a token."""
    count, active = (128, 8) if size.hidden > 1024 else (8, 2)
    hidden, inner = size.hidden // 2, size.hidden // 16 * 3

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).div_(columns**0.5).to(dtype)

    held = kernels.expert_weights(
        [
            (matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner))
            for _ in range(count)
        ]
    )
    each = 3 * inner * hidden * dtype.itemsize
    for tokens in (1, size.batch, size.tokens):
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        logits = torch.randn(tokens, count, device=device).to(dtype)
        weights, chosen = kernels.route(logits, active, renormalise=True)
        yield Case(
            name=f"route {tokens} x {count}, {active} of them",
            run=lambda logits=logits: kernels.route(logits, active, renormalise=True)[0],  # type: ignore[misc]
            nbytes=logits.nbytes + 10 * tokens * active,
            torch_run=lambda logits=logits: logits.float().softmax(-1).topk(active),  # type: ignore[misc]
        )
        used = len(chosen.unique())
        yield Case(
            name=f"mixture {tokens} x {hidden}, {active} of {count} x {inner}",
            run=lambda x=x, weights=weights, chosen=chosen: (  # type: ignore[misc]
                kernels.mixture(x, weights, chosen, held, "silu")
            ),
            nbytes=0.0 if tokens > 512 else used * each + 2 * x.nbytes,
            flops=6 * tokens * active * inner * hidden if tokens > 512 else 0.0,
        )


def wire(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Blocks packed for the way between two pools."""
    pool = torch.randn(2 * size.blocks, size.layers, 2, 16, 8, 128, device=device).to(dtype)
    ids = torch.randperm(2 * size.blocks, device=device)[: size.blocks]
    moved = pool.nbytes // 2
    for form in ("int8", "fp8"):
        packed = kernels.gather_blocks(pool, ids, wire=form)
        yield Case(
            name=f"gather_blocks {size.blocks} packed {form}",
            run=lambda form=form: kernels.gather_blocks(pool, ids, wire=form),  # type: ignore[misc]
            nbytes=moved + packed.nbytes,
            compare=False,  # bytes; scatter compares the numbers
        )

        def unpack(form: str = form, packed: torch.Tensor = packed) -> torch.Tensor:
            kernels.scatter_blocks(packed, pool, ids, wire=form)
            return pool

        yield Case(
            name=f"scatter_blocks {size.blocks} packed {form}",
            run=unpack,
            nbytes=moved + packed.nbytes,
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
    buffer = kernels.gather_blocks(pool, ids)
    for word in ("triton", "cuda") if device == "cuda" else ():
        yield Case(
            name=f"gather_blocks {size.blocks} by {word}",
            run=lambda: kernels.gather_blocks(pool, ids, buffer),
            nbytes=2 * buffer.nbytes,
            choose=f"gather_blocks={word}",
        )

        def scatter() -> torch.Tensor:
            kernels.scatter_blocks(buffer, pool, ids)
            return pool

        yield Case(
            name=f"scatter_blocks {size.blocks} by {word}",
            run=scatter,
            nbytes=2 * buffer.nbytes,
            choose=f"scatter_blocks={word}",
        )


def sampling(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Always of float32 logits."""
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
        yield Case(
            name=f"dequantize {name} {rows} x {columns}",
            run=lambda weight=weight: kernels.dequantize(weight, dtype),  # type: ignore[misc]
            nbytes=weight.nbytes + dense.nbytes,
        )
        for tokens in (1, size.batch, size.tokens):
            x = torch.randn(tokens, columns, device=device).to(dtype)
            yield Case(
                name=f"quantized_linear {name} {tokens} x {columns} x {rows}",
                run=lambda x=x, weight=weight: kernels.quantized_linear(x, weight),  # type: ignore[misc]
                nbytes=0.0 if tokens > 512 else weight.nbytes + x.nbytes * (1 + rows / columns),
                flops=2 * tokens * rows * columns if tokens > 512 else 0.0,
                torch_run=lambda x=x: functional.linear(x, dense),  # type: ignore[misc]
            )


GROUPS = {
    "pointwise": pointwise,
    "attention": attention,
    "float8": attention_float8,
    "blocks": blocks,
    "wire": wire,
    "sampling": sampling,
    "quantized": quantized,
    "products": products,
    "experts": experts,
}
"""Every operation. A group by its name can run in a process of its own."""
