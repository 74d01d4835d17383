"""`pdserve bench profile`: how long things take at the workers of this machine, for `simulate`.

Times steps of real engines, as many beside each other as there will be workers, and fits what
they depend on. Then it asks a real cluster a little: what a token costs beyond the step, and a
hand-over. A minute or two; writes one JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Run, Server, measure
from pdserve.bench.machine import circumstances
from pdserve.bench.phases import HEADER, phases_of
from pdserve.bench.serve import EXIT_USAGE, ProgressBar
from pdserve.bench.simulation.profile import Profile, StepTimes
from pdserve.bench.step_times import Engine, Job, Point, Sample, grid
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.bench.workloads import Shape, make
from pdserve.cluster.cores import divide, own_cores, own_quota
from pdserve.cluster.model_files import resolve_model

AT_ONCE = (1, 4, 8)
"""Requests per worker at a time, for what a step costs beyond the engine."""
LENGTHS = (64, 512)
"""Prompts, for what a request and a hand-over cost beyond the engine."""
PROBES = 12
FIRST_GAPS = 6
"""Of an answer, in which the prompts of others may be computed."""
TIMEOUT_S = 600.0
PASSED_ON = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "block_size", "dtype",
             "device")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="pdserve bench profile", description=__doc__)
    cores = len(own_cores())
    add = found.add_argument
    add("--model", default="", help="folder or hub name (default: demo model)")
    add("--workers", type=int, default=cores, help=f"that share this machine (default: {cores})")
    add("--kv-total", type=int, default=1024, help="KV cache of all workers, MiB (default: 1024)")
    add("--max-num-batched-tokens", type=int, default=0, help="of a step (default: the workers')")
    add("--max-num-seqs", type=int, default=64, help="requests of a step (default: 64)")
    add("--max-model-len", type=int, default=0, help="tokens (default 0: the model's own limit)")
    add("--block-size", type=int, default=16, help="tokens of a KV block (default: 16)")
    add("--dtype", default="auto", help="of the weights (default: auto, the checkpoint's)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    add("--vocab", type=int, default=1000, help="token ids of prompts lie under this")
    add("--out", type=Path, default=Path("profile.json"), help="file (default: profile.json)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.workers < 1:
            raise BenchError(f"--workers must be at least 1, not {args.workers}.")
        engines = _time_steps(args)
        step, errors = fit(quietest(engines))
        print("asking a cluster", file=sys.stderr)
        profile = _around(args, engines, step, errors)
    except (BenchError, ValueError) as error:
        print(f"pdserve bench profile: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    print(text(profile))
    print(f"profile: {args.out}")
    return 0


# the engine


def _time_steps(args: argparse.Namespace) -> list[Engine]:
    """One process per worker, all at once."""
    shares = divide(own_cores(), args.workers, own_quota())
    jobs = [
        Job(
            folder=str(resolve_model(args.model)),
            cpus=share.cpus,
            threads=share.threads,
            seed=number,
            kv_cache_memory=(args.kv_total << 20) // args.workers,
            **{name: getattr(args, name) for name in PASSED_ON},
        )
        for number, share in enumerate(shares)
    ]
    print(f"timing steps of {args.workers} engines beside each other", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_child(job)) for job in jobs]
        for child in children:
            _line(child, "ready")
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        bar = ProgressBar(len(grid(jobs[0], sys.maxsize, sys.maxsize)))
        found = [_samples(children[0], bar.show), *(_samples(child) for child in children[1:])]
        bar.end()
    return found


@contextlib.contextmanager
def _child(job: Job) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "pdserve.bench.step_times",
               msgspec.json.encode(job).decode()]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        late = threading.Timer(TIMEOUT_S, process.kill)
        late.start()
        try:
            yield process
        finally:
            late.cancel()
            process.kill()


def _line(child: subprocess.Popen[str], expected: str = "") -> str:
    assert child.stdout is not None
    line = child.stdout.readline().rstrip("\n")
    if not line or (expected and line != expected):
        raise BenchError("An engine could not be timed; its messages are above.")
    return line


def _samples(
    child: subprocess.Popen[str], progress: Callable[[int, int], None] = lambda done, running: None
) -> Engine:
    done = 0
    while (line := _line(child)) == "point":
        done += 1
        progress(done, 1)
    return msgspec.json.decode(line, type=Engine)


def quietest(engines: Sequence[Engine]) -> list[Sample]:
    """For each point the least time of the engines, which all had the others beside them: what was
    longer had something else to wait for."""
    found: dict[Point, float] = {}
    for sample in (sample for engine in engines for sample in engine.samples):
        found[sample.point] = min(sample.seconds, found.get(sample.point, math.inf))
    return [Sample(point, seconds) for point, seconds in found.items()]


def fit(samples: Sequence[Sample]) -> tuple[StepTimes, dict[str, float]]:
    """The laws that `StepTimes` states, and how far they are off."""
    alone = [sample for sample in samples if not sample.point.prompts]
    mixed = [sample for sample in samples if sample.point.prompts]
    counts = sorted({len(sample.point.contexts) for sample in alone})
    decode, off = [], []
    for count in counts:
        same = [sample for sample in alone if len(sample.point.contexts) == count]
        rows = [(1.0, sum(sample.point.contexts)) for sample in same]
        (base, context), error = least(rows, [sample.seconds for sample in same])
        decode.append((count, base, context))
        off += [error] * len(same)
    more = [
        (1.0, s.point.tokens, s.point.pairs, len(s.point.contexts), sum(s.point.contexts))
        for s in mixed
    ]
    prompt, prompt_error = least([*more], [s.seconds for s in mixed])
    step = StepTimes(
        decode=tuple(decode),
        mixed=(prompt[0], prompt[1], prompt[2], prompt[3], prompt[4]),
    )
    return step, {"decode": statistics.fmean(off), "mixed": prompt_error}


def least(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[list[float], float]:
    """Weights ≥ 0 of the least relative squares, and the mean relative error: what would be
    negative is left out, the most negative first, and tried again."""
    y = np.array(values, dtype=float)
    a = np.array(rows, dtype=float) / y[:, None]
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)
    kept = list(range(a.shape[1]))
    weights = np.zeros(a.shape[1])
    while kept:
        found = np.linalg.lstsq((a / scale)[:, kept], np.ones(len(y)), rcond=None)[0]
        if found.min() >= 0:
            weights[kept] = found / scale[kept]
            break
        del kept[int(found.argmin())]
    return [float(weight) for weight in weights], float(np.abs(a @ weights - 1).mean())


# what lies around it


def _around(
    args: argparse.Namespace, engines: Sequence[Engine], step: StepTimes, errors: dict[str, float]
) -> Profile:
    engine = engines[0]
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in PASSED_ON]
    options += [f"--model={args.model}"] if args.model else []
    kv_total = args.kv_total << 20
    with up([*options, *Topology(colocated=args.workers).options(kv_total)]) as cluster:
        pauses = [_pause_s(cluster, args, count, step) for count in AT_ONCE]
        alone = [_alone(cluster, args, length) for length in LENGTHS]
        busy_s = _busy_prompt_s(cluster, args)
    # A step takes longer in a worker than over and over in a row: caches are cold, others run, and
    # more so while all workers have prompts.
    slower = [one.prompt_s / step.mixed_s(one.length, one.length**2 / 2) for one in alone]
    slower.append(busy_s / step.mixed_s(LENGTHS[-1], LENGTHS[-1] ** 2 / 2))
    mixed = tuple(weight * max(1.0, statistics.mean(slower)) for weight in step.mixed)
    step = msgspec.structs.replace(step, mixed=mixed, loop=_line_through(AT_ONCE, pauses))
    split = Topology(prefill=max(1, args.workers - 1), decode=1)
    with up([*options, *split.options(kv_total)]) as cluster:
        asked = [_alone(cluster, args, length) for length in LENGTHS]
    handed = [one.gap_s - step.decode_s(1, one.length) for one in asked]
    return Profile(
        model=Path(args.model).name or "demo",
        device=engine.device,
        dtype=engine.dtype,
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_model_len=engine.max_model_len,
        step=step,
        front_s=statistics.mean(one.front_s for one in alone),
        hand_over=_line_through(LENGTHS, handed),
        errors=errors,
        measured={
            "steps": [msgspec.to_builtins(engine.samples) for engine in engines],
            "pauses_s": dict(zip(map(str, AT_ONCE), pauses, strict=True)),
            "busy_prompt_s": busy_s,
            "alone": [dataclasses.asdict(one) for one in alone],
            "handed_over": [dataclasses.asdict(one) for one in asked],
        },
        circumstances=circumstances(),
    )


def _line_through(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Base and slope, neither below 0."""
    (base, slope), _ = least([(1.0, place) for place in places], [max(v, 1e-6) for v in values])
    return base, slope


def _ask(cluster: Cluster, args: argparse.Namespace, shape: Shape, at_once: int, salt: str) -> Run:
    server = Server(url=cluster.url, model=NAME, headers=HEADER, extra={"cache_salt": salt})
    run = measure(server, make(shape), Arrivals(kind="closed", concurrency=at_once), seed=0)
    for record in run.records:
        if record.error:
            raise BenchError(f"The cluster does not answer: {record.error}")
    return run


def _pause_s(cluster: Cluster, args: argparse.Namespace, count: int, step: StepTimes) -> float:
    """Between two steps of `count` requests per worker: what a gap is longer than the step."""
    at_once = count * args.workers
    shape = Shape(kind="fixed", requests=at_once, input_len=64, output_len=48,
                  vocab=(10, args.vocab))  # fmt: skip
    _ask(cluster, args, dataclasses.replace(shape, output_len=4), at_once, f"warm-{count}")
    means = []
    for number in range(3):
        run = _ask(cluster, args, shape, at_once, f"{count}-{number}")
        # The mean, since what router and client take of the cores comes in bursts; without the
        # gaps in which others' prompts were computed.
        means.append(statistics.fmean(gap for r in run.records for gap in r.gaps[FIRST_GAPS:]))
    return statistics.median(means) - step.decode_s(count, count * (64 + (FIRST_GAPS + 48) // 2))


def _busy_prompt_s(cluster: Cluster, args: argparse.Namespace) -> float:
    """A worker's time for a prompt of the longest of LENGTHS while no worker is ever idle."""
    shape = Shape(kind="fixed", requests=PROBES * args.workers, input_len=LENGTHS[-1], output_len=1,
                  vocab=(10, args.vocab), seed=2)  # fmt: skip
    wall_s = _ask(cluster, args, shape, 3 * args.workers, "busy").wall_s
    return wall_s / PROBES


@dataclass(frozen=True, slots=True)
class Alone:
    """Medians over requests that came one by one."""

    length: int
    prompt_s: float
    """From the step that began its prompt to its first token, in the worker."""
    front_s: float
    """What the client waited longer than that."""
    gap_s: float
    """From its first to its second token."""


def _alone(cluster: Cluster, args: argparse.Namespace, length: int) -> Alone:
    shape = Shape(kind="fixed", requests=PROBES, input_len=length, output_len=2,
                  vocab=(10, args.vocab))  # fmt: skip
    _ask(cluster, args, dataclasses.replace(shape, requests=4, seed=1), 1, "warm")
    run = _ask(cluster, args, shape, 1, f"alone-{length}")
    spent = [phases_of(record.timings or {})["prefill"] for record in run.records]
    return Alone(
        length,
        statistics.median(spent),
        statistics.median(r.ttft - s for r, s in zip(run.records, spent, strict=True)),
        statistics.median(record.gaps[0] for record in run.records),
    )


def text(profile: Profile) -> str:
    """What was found, for people."""
    step, length = profile.step, min(512, profile.max_num_batched_tokens)
    rows = [
        f"{profile.model}, {profile.dtype} on {profile.device}: {profile.kv_tokens} tokens of KV "
        "per worker",
        f"a prompt of {length} tokens {step.mixed_s(length, length**2 / 2) * 1e3:.1f} ms; "
        + "; ".join(
            f"a step of {count} tokens {step.decode_s(count, count * 256) * 1e3:.1f} ms"
            for count in (1, 8, 32)
        ),
        f"around a request {profile.front_s * 1e3:.1f} ms; a hand-over of {length} tokens "
        f"{profile.transfer_s(length) * 1e3:.1f} ms",
        "mean error of the fits: "
        + ", ".join(f"{name} {error:.0%}" for name, error in profile.errors.items()),
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
