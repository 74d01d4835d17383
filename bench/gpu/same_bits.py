"""What --batch-invariant rests on: rows alone, in parts and all together have the same bits, in all
dtypes. The last line says what came of it; exit code 1 if anything differs.

    python -P bench/gpu/same_bits.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from pdserve import kernels

ROWS = 700
PARTS = (slice(0, 1), slice(1, 2), slice(63, 65), slice(100, 613), slice(699, 700))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Rows = Callable[[slice], torch.Tensor]
"""The results of some of the rows, computed without the others."""


def operations(device: str, dtype: torch.dtype, hidden: int) -> Iterator[tuple[str, Rows]]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        """Products keep the size of what they multiply: float16 ends at 65,504."""
        return torch.randn(rows, columns, device=device).div_(columns**0.5).to(dtype)

    x, weight = random(ROWS, hidden), random(hidden // 2 + 24, hidden)
    yield "linear", lambda part: kernels.linear(x[part], weight, invariant=True)
    whole = kernels.quantize(weight, "int8")
    yield (
        "quantized_linear",
        lambda part: kernels.quantized_linear(x[part], whole, invariant=True),
    )
    heads, norm = random(ROWS, 3, 128), random(128)
    yield "rms_norm of heads", lambda part: kernels.rms_norm(heads[part], norm, 1e-6)
    wide = random(hidden)
    yield "rms_norm", lambda part: kernels.rms_norm(x[part], wide, 1e-6)
    up = random(ROWS, hidden)
    yield "silu_and_mul", lambda part: kernels.silu_and_mul(x[part], up[part], invariant=True)
    inner = hidden // 4
    experts = kernels.expert_weights(
        [(matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner)) for _ in range(9)]
    )
    weights, chosen = kernels.route(random(ROWS, 9), 3, renormalise=True)
    yield (
        "mixture",
        lambda part: kernels.mixture(
            x[part], weights[part], chosen[part], experts, "silu", invariant=True
        ),
    )
    yield from attention(device, random)


def attention(device: str, random: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Rows]]:
    """Chunks of one sequence, each over everything before it."""
    cache, query = random(-(-ROWS // 16), 2, 16, 2, 128), random(ROWS, 8, 128)
    table = torch.randperm(cache.shape[0], device=device).view(1, -1)
    for window in (None, 100):

        def chunk(part: slice, window: int | None = window) -> torch.Tensor:
            return kernels.attention_prefill(
                query[part],
                cache,
                torch.tensor([0, part.stop - part.start], device=device),
                torch.tensor([part.stop], device=device),
                table,
                scale=0.09,
                window=window,
                invariant=True,
            )

        yield f"attention, window {window}", chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("same_bits: error: torch finds no CUDA device here.", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    names, different, useless = dict[str, None](), list[str](), list[str]()
    for dtype in DTYPES:
        for name, rows in operations(args.device, dtype, args.hidden):
            names[name] = None
            together = rows(slice(0, ROWS))
            where = f"{name} in {str(dtype)[6:]}"
            if not together.isfinite().all():
                useless.append(where)
            elif any(not torch.equal(rows(part), together[part]) for part in PARTS):
                different.append(where)
    if useless:
        print(f"NaN or infinity, so nothing was compared: {'; '.join(useless)}")
    if different:
        print(f"DIFFERENT bits: {'; '.join(different)}")
    if useless or different:
        sys.exit(1)
    print(f"the same bits alone and together: {', '.join(names)}; in {len(DTYPES)} dtypes")


if __name__ == "__main__":
    main()
