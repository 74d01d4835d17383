"""Time, bandwidth and arithmetic of every kernel: `python -P -m pdserve.bench.kernels`.

Per operation: the median time, GB/s or TFLOP/s, the share of the ceiling measured in the same run
(a large copy, a large matrix product), torch's own time for the same as a ratio (above 1: ours is
faster), and the relative error against the plain-torch reference. On a GPU the L2 cache is flushed
before each run; the time between two events around a launch that does nothing is printed, and is
part of every other time. A case that raises is reported and the next one runs. `--check` makes
errors a condition: exit code 1 if one is above its tolerance, or a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pdserve.bench.kernel_cases import GROUPS, LARGE, SMALL, Case, Run, Sizes
from pdserve.kernels import dispatch, native, trials, tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLUSH = 1 << 28
"""Numbers (1 GiB) written before each run on a GPU: more than its L2 holds, and it takes so long
that the run's launches are in line before the clock starts."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A case, or a whole group, that raised."""

    name: str
    reason: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", choices=("auto", "small", "large"), default="auto",
                        help="of the cases (auto: large on a GPU, small on the CPU)")  # fmt: skip
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS),
                        help="of operations (default: all)")  # fmt: skip
    parser.add_argument("--tune", action="store_true",
                        help="first measure configurations, as a worker on a GPU does")  # fmt: skip
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
    if args.tune and device == "cpu":
        parser.error("--tune: there is nothing to choose on the CPU; leave it out.")
    small = args.size == "small" or (args.size == "auto" and device == "cpu")
    clock = Clock(device, args.repeat)
    copy, product = ceilings(clock, device, DTYPES[args.dtype], small)
    launch = clock.seconds(torch.zeros(1, device=device).zero_) * 1e6
    print(
        f"{device}, {args.dtype}: copy {copy:.0f} GB/s, matrix product {product:.2f} TFLOP/s; "
        f"of each time, {launch:.1f} us are those of a launch that does nothing"
    )
    print(f"{'operation':42} {'us':>10} {'rate':>14} {'share':>6} {'x torch':>8} {'error':>9}")
    results: list[Result] = []
    failures: list[Failure] = []
    if args.tune:
        try:
            tune(DTYPES[args.dtype])
        except Exception as error:  # the table's first entries will do
            failures.append(failure("tuning", error))
    for group in args.groups:
        torch.manual_seed(0)
        for case in cases(group, SMALL if small else LARGE, device, DTYPES[args.dtype]):
            if isinstance(case, Failure):
                failures.append(case)
            elif args.only in case.name:
                try:
                    results.append(measure(case, clock, copy, product, DTYPES[args.dtype]))
                    print(line(results[-1]), flush=True)
                except Exception as error:  # the next one may run
                    failures.append(failure(case.name, error))
    if args.json is not None:
        about = {"device": device, "dtype": args.dtype, "torch": torch.__version__}
        about |= {"copy_gb_s": copy, "product_tflop_s": product, "launch_us": launch}
        about |= {
            "results": [asdict(r) for r in results],
            "failures": [asdict(f) for f in failures],
        }
        args.json.write_text(json.dumps(about))
    wrong = [r.name for r in results if r.error is not None and not r.error <= r.tolerance]
    if wrong:
        print(f"Too far from the reference: {', '.join(wrong)}.")
    sys.exit(bool((wrong or failures) and args.check))


def cases(group: str, size: Sizes, device: str, dtype: torch.dtype) -> Iterator[Case | Failure]:
    """A group's cases, and its failure as the last one if it cannot go on."""
    try:
        yield from GROUPS[group](size, device, dtype)
    except Exception as error:  # another group may do
        yield failure(group, error)


def failure(name: str, error: Exception) -> Failure:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"{name:42} FAILED: {reason}", flush=True)
    return Failure(name=name, reason=reason)


@torch.inference_mode()
def tune(dtype: torch.dtype) -> None:
    """Measure, or read what was measured, for the shapes of the attention cases; print it."""
    for kept in dict.fromkeys((dtype, torch.float8_e4m3fn)):
        pool = torch.zeros(2048, 8, 2, 16, 4, 128, dtype=kept, device="cuda")
        model = trials.Model(
            dtype=dtype, heads=32, hidden_size=4096, vocab_size=151_936, invariant=True
        )
        found = tuning.tune(
            trials.trials(pool, model), key=tuning.fingerprint(), timer=tuning.cuda_seconds
        )
        for name, config in found.items():
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in config.items())}")


class Clock:
    """Medians of repeated runs on one device."""

    def __init__(self, device: str, repeat: int) -> None:
        self.device = device
        self.repeat = repeat
        self._flush = torch.empty(FLUSH if device == "cuda" else 0, device=device)

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
    with overridden(case.choose) if case.choose else contextlib.nullcontext():
        seconds = clock.seconds(case.run)
        mine = _tensors(case.run()) if case.compare else None
    rate = (case.flops / 1e12 if case.flops else case.nbytes / 1e9) / seconds
    other = torch_seconds(case, clock)
    return Result(
        name=case.name,
        microseconds=seconds * 1e6,
        rate=rate,
        unit="TFLOP/s" if case.flops else "GB/s",
        share=rate / (product if case.flops else copy),
        torch_ratio=None if other is None else other / seconds,
        error=None if mine is None else error_of(case, mine),
        tolerance=TOLERANCE[dtype],
    )


def torch_seconds(case: Case, clock: Clock) -> float | None:
    """Of the fastest of torch's own ways."""
    if case.torch_run is None:
        return None
    found = [clock.seconds(case.torch_run)]
    for run in case.torch_others:
        with contextlib.suppress(RuntimeError):  # a kernel that this machine or dtype lacks
            found.append(clock.seconds(run))
    return min(found)


def error_of(case: Case, mine: list[torch.Tensor]) -> float:
    """Relative distance between a case's result and the reference's."""
    with overridden("reference"):
        theirs = _tensors(case.run())
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        wide = other.double()
        distance = ((one.double() - wide).norm() / wide.norm().clamp(1e-30)).item()
        worst = math.inf if math.isnan(distance) else max(worst, distance)
    return worst


@contextlib.contextmanager
def overridden(text: str) -> Iterator[None]:
    """Other implementations for a while: what PDSERVE_KERNELS says. What was measured to be the
    fastest comes back afterwards."""
    before = os.environ.get(dispatch.ENVIRONMENT)
    settled = dispatch.choices("cuda") if torch.cuda.is_available() else {}
    os.environ[dispatch.ENVIRONMENT] = text
    dispatch.forget()
    native.library.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.ENVIRONMENT]
        else:
            os.environ[dispatch.ENVIRONMENT] = before
        dispatch.forget()
        native.library.cache_clear()
        for operation, word in settled.items():
            if word != "reference":
                dispatch.settle(operation, word)


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


if __name__ == "__main__":
    main()
