"""Time, bandwidth and arithmetic of every kernel: `python -P -m pdserve.bench.kernels`.

Per operation: the median time, GB/s or TFLOP/s, the share of the ceiling measured in the same run
(a large copy, a large matrix product), torch's own time for the same as a ratio (above 1: ours is
faster), and the relative error against the plain-torch reference. On a GPU the L2 cache is flushed
before each run. `--check` makes the errors a condition: exit code 1 if one is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

from pdserve import kernels
from pdserve.kernels import dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLUSH_BYTES = 256 << 20
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the table. Times in microseconds; None: does not apply."""

    name: str
    microseconds: float
    rate: float
    unit: str
    share: float
    torch_ratio: float | None
    error: float | None
    tolerance: float


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", choices=("auto", "small", "large"), default="auto",
                        help="of the cases (auto: large on a GPU, small on the CPU)")  # fmt: skip
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--repeat", type=int, default=20, help="timed runs per case (default 20)")
    parser.add_argument("--check", action="store_true", help="fail if an error is too large")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; use --device cpu.")
    small = args.size == "small" or (args.size == "auto" and device == "cpu")
    clock = Clock(device, args.repeat)
    copy, product = ceilings(clock, device, DTYPES[args.dtype], small)
    print(f"{device}, {args.dtype}: copy {copy:.0f} GB/s, matrix product {product:.2f} TFLOP/s")
    print(f"{'operation':42} {'us':>10} {'rate':>14} {'share':>6} {'x torch':>8} {'error':>9}")
    results = []
    torch.manual_seed(0)
    for case in cases(SMALL if small else LARGE, device, DTYPES[args.dtype]):
        if args.only in case.name:
            results.append(measure(case, clock, copy, product, DTYPES[args.dtype]))
            print(line(results[-1]), flush=True)
    if args.json is not None:
        about = {"device": device, "dtype": args.dtype, "torch": torch.__version__}
        about |= {"copy_gb_s": copy, "product_tflop_s": product}
        args.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}))
    wrong = [r.name for r in results if r.error is not None and not r.error <= r.tolerance]
    if wrong:
        print(f"Too far from the reference: {', '.join(wrong)}.")
    sys.exit(bool(wrong and args.check))


class Clock:
    """Medians of repeated runs on one device."""

    def __init__(self, device: str, repeat: int) -> None:
        self.device = device
        self.repeat = repeat
        self._flush = torch.empty(FLUSH_BYTES if device == "cuda" else 0, device=device)

    def seconds(self, run: Run) -> float:
        for _ in range(3):
            run()
        return statistics.median(self._once(run) for _ in range(self.repeat))

    def _once(self, run: Run) -> float:
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


def ceilings(clock: Clock, device: str, dtype: torch.dtype, small: bool) -> tuple[float, float]:
    """GB/s of a large copy (read and written) and TFLOP/s of a large matrix product."""
    source = torch.zeros((1 << 24) if small else (1 << 28), device=device)
    target = torch.empty_like(source)
    copied = clock.seconds(lambda: target.copy_(source))
    side = 512 if small else 8192
    square = torch.randn(side, side, device=device).to(dtype)
    multiplied = clock.seconds(lambda: square @ square)
    return 2 * source.nbytes / copied / 1e9, 2 * side**3 / multiplied / 1e12


def measure(case: Case, clock: Clock, copy: float, product: float, dtype: torch.dtype) -> Result:
    seconds = clock.seconds(case.run)
    rate = (case.flops / 1e12 if case.flops else case.nbytes / 1e9) / seconds
    other = None if case.torch_run is None else clock.seconds(case.torch_run) / seconds
    return Result(
        name=case.name,
        microseconds=seconds * 1e6,
        rate=rate,
        unit="TFLOP/s" if case.flops else "GB/s",
        share=rate / (product if case.flops else copy),
        torch_ratio=other,
        error=error_of(case) if case.compare else None,
        tolerance=TOLERANCE[dtype],
    )


def error_of(case: Case) -> float:
    """Relative distance between the chosen implementation's result and the reference's."""
    mine = _tensors(case.run())
    before = os.environ.get(dispatch.ENVIRONMENT)
    os.environ[dispatch.ENVIRONMENT] = "reference"
    dispatch.forget()
    try:
        theirs = _tensors(case.run())
    finally:
        if before is None:
            del os.environ[dispatch.ENVIRONMENT]
        else:
            os.environ[dispatch.ENVIRONMENT] = before
        dispatch.forget()
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        wide = other.double()
        distance = ((one.double() - wide).norm() / wide.norm().clamp(1e-30)).item()
        worst = math.inf if math.isnan(distance) else max(worst, distance)
    return worst


def _tensors(result: Any) -> list[torch.Tensor]:
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,))]


def line(result: Result) -> str:
    ratio = "" if result.torch_ratio is None else f"{result.torch_ratio:.2f}"
    error = "" if result.error is None else f"{result.error:.1e}"
    rate = f"{result.rate:.1f} {result.unit}"
    return (
        f"{result.name:42} {result.microseconds:10.1f} {rate:>14} {result.share:6.0%} "
        f"{ratio:>8} {error:>9}"
    )


def cases(size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every operation, its inputs made when its turn comes."""
    yield from pointwise(size, device, dtype)
    yield from attention(size, device, dtype)
    yield from blocks(size, device, dtype)
    yield from sampling(size, device)


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


if __name__ == "__main__":
    main()
