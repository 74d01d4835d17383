"""`pdserve bench profile`: how long things take at the workers of this machine, for `simulate`.

Times steps of real engines, one alone and as many beside each other as there will be workers, and
fits what they depend on. Then it asks a real cluster a little: what a token costs beyond the step,
and a hand-over. Two minutes for a small model; writes one JSON file.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pdserve.bench.arrivals import Arrivals, BenchError
from pdserve.bench.client import Run, Server, measure
from pdserve.bench.engines import Engines
from pdserve.bench.fit import fit, line_through, typical
from pdserve.bench.machine import circumstances
from pdserve.bench.phases import HEADER, phases_of
from pdserve.bench.reference import ANSWER, CONTEXT, FIRST_GAPS, LENGTH, PROMPT
from pdserve.bench.serve import EXIT_USAGE, ProgressBar
from pdserve.bench.simulation.profile import Profile, StepTimes
from pdserve.bench.step_times import Engine, Job, Sample, grid
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.bench.workloads import Shape, make
from pdserve.cluster.cores import divide, own_cores, own_quota
from pdserve.cluster.model_files import resolve_model

AT_ONCE = (1, 4, 8, 9, 12, 16, 32)
"""Requests per worker at a time, for what a step costs beyond the engine."""
LENGTHS = (LENGTH, PROMPT)
"""Prompts, for what a request and a hand-over cost beyond the engine."""
PROBES = 12
REPEATS = 5
"""How often the pace of answers is measured."""
CHURN, CHURN_ANSWER = 6, 256
"""Answers at a time, and their longest length, for what a request costs those beside it: those that
come soon after each other cost less, since the code that takes them in is in the caches."""
PASSES = 3
"""Over all steps, alone and beside each other."""
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
        timed = _time_steps(args)
        print("asking a cluster", file=sys.stderr)
        profile = _around(args, timed)
    except (BenchError, ValueError) as error:
        print(f"pdserve bench profile: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    print(text(profile))
    print(f"profile: {args.out}")
    return 0


# the engine


@dataclass(frozen=True, slots=True)
class _Timed:
    """Steps of an engine, without what lies between them."""

    engine: Engine
    alone: list[Sample]
    beside: list[Sample]
    """While all compute."""


def _time_steps(args: argparse.Namespace) -> _Timed:
    """One process per worker; in turns the first alone and all at once."""
    shares = divide(own_cores(), args.workers, own_quota())
    if len({share.threads for share in shares}) > 1:
        raise BenchError(
            f"--workers ({args.workers}) must divide the cores evenly, or some are faster: their "
            f"threads would be {', '.join(str(share.threads) for share in shares)}."
        )
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
    print(f"timing steps of {args.workers} engines, alone and beside each other", file=sys.stderr)
    turns = [1, args.workers] * PASSES if args.workers > 1 else [1] * PASSES
    bar = ProgressBar(len(turns) * len(grid(jobs[0], sys.maxsize, sys.maxsize)))
    done = itertools.count(1)
    found: dict[int, list[Engine]] = {}
    with Engines(jobs) as engines:
        for count in turns:
            timed = engines.timed(count, lambda: bar.show(next(done), 1))
            found.setdefault(count, []).extend(timed)
    bar.end()
    alone, beside = (
        typical([sample for engine in found[count] for sample in engine.samples])
        for count in (1, args.workers)
    )
    return _Timed(found[1][0], alone, beside)


# what lies around it


def _around(args: argparse.Namespace, timed: _Timed) -> Profile:
    engine = timed.engine
    (alone, errors), (beside, errors_beside) = fit(timed.alone), fit(timed.beside)
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in PASSED_ON]
    options += [f"--model={args.model}"] if args.model else []
    kv_total = args.kv_total << 20
    with up([*options, *Topology(colocated=args.workers).options(kv_total)]) as cluster:
        between = _paced(cluster, args, args.workers)
        lone = [_lone(cluster, args, length) for length in LENGTHS]
        busy_s = _busy_prompt_s(cluster, args)
    split = Topology(prefill=max(1, args.workers - 1), decode=1)
    with up([*options, *split.options(kv_total)]) as cluster:
        asked = [_lone(cluster, args, length) for length in LENGTHS]
        by_one, churned = between, list[Run]()
        if args.workers > 1:  # a worker that has all cores elsewhere has half of them here
            by_one = _paced(
                cluster, args, 1, lambda number: churned.append(_churn(cluster, args, number))
            )
    # A step takes longer in a worker than over and over in a row: caches are cold, others run.
    slower = [one.prompt_s / alone.mixed_s(one.length, one.length**2 / 2) for one in lone]
    busier = busy_s / beside.mixed_s(LENGTHS[-1], LENGTHS[-1] ** 2 / 2)
    alone = _in_a_worker(alone, statistics.mean(slower), by_one)
    beside = _in_a_worker(beside, busier, between) if args.workers > 1 else alone
    prompt_s = alone.mixed_s(LENGTH, LENGTH**2 / 2)
    handed = [one.gap_s - alone.decode_s(1, one.length) for one in asked]
    return Profile(
        model=Path(args.model).name or "demo",
        device=engine.device,
        dtype=engine.dtype,
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_model_len=engine.max_model_len,
        workers=args.workers,
        alone=alone,
        beside=beside,
        request_s=lost_s(churned, alone, beside, prompt_s) if churned else 0.0,
        jitter=statistics.fmean(paced.jitter for paced in between),
        front_s=statistics.mean(one.front_s for one in lone),
        hand_over=line_through(LENGTHS, handed),
        errors={name: max(error, errors_beside[name]) for name, error in errors.items()},
        measured={
            "steps_alone": msgspec.to_builtins(timed.alone),
            "steps_beside": msgspec.to_builtins(timed.beside),
            "paced_alone": [dataclasses.asdict(one) for one in by_one],
            "paced_beside": [dataclasses.asdict(one) for one in between],
            "busy_prompt_s": busy_s,
            "alone": [dataclasses.asdict(one) for one in lone],
            "handed_over": [dataclasses.asdict(one) for one in asked],
        },
        circumstances=circumstances(),
    )


def _in_a_worker(step: StepTimes, slower: float, paced: Sequence[Paced]) -> StepTimes:
    """With what a prompt takes longer there, and what lies between two steps: what a gap between
    tokens is longer than the step."""
    counts = [one.count for one in paced]
    pauses = [one.gap_s - step.decode_s(one.count, one.count * CONTEXT) for one in paced]
    decode = tuple(
        (n, base + float(np.interp(n, counts, pauses)), token) for n, base, token in step.decode
    )
    base, token, pair = (weight * max(1.0, slower) for weight in step.prompt)
    loop = line_through(counts, pauses)
    return msgspec.structs.replace(step, decode=decode, prompt=(base, token, pair), loop=loop)


def _ask(cluster: Cluster, args: argparse.Namespace, shape: Shape, at_once: int, salt: str) -> Run:
    server = Server(url=cluster.url, model=NAME, headers=HEADER, extra={"cache_salt": salt})
    run = measure(server, make(shape), Arrivals(kind="closed", concurrency=at_once), seed=0)
    for record in run.records:
        if record.error:
            raise BenchError(f"The cluster does not answer: {record.error}")
    return run


@dataclass(frozen=True, slots=True)
class Paced:
    """Answers that came at the same time and nothing else."""

    count: int
    """Of one worker."""
    gap_s: float
    jitter: float
    """See Profile."""


def _paced(
    cluster: Cluster,
    args: argparse.Namespace,
    workers: int,
    then: Callable[[int], None] = lambda number: None,
) -> list[Paced]:
    """AT_ONCE requests at each of so many workers, in turns and several times; `then` after each
    turn, so that what it measures is measured while the machine is as fast."""
    counts = [count for count in AT_ONCE if count <= args.max_num_seqs]
    means: dict[int, list[float]] = {count: [] for count in counts}
    for number, count in itertools.product(range(-1, REPEATS), counts):
        warm = number < 0
        shape = Shape(kind="fixed", requests=count * workers, input_len=LENGTH,
                      output_len=4 if warm else ANSWER, vocab=(10, args.vocab))  # fmt: skip
        run = _ask(cluster, args, shape, count * workers, f"{count}-{number}")
        if not warm:  # the gaps in which others' prompts were computed are left out
            means[count] += [statistics.fmean(r.gaps[FIRST_GAPS:]) for r in run.records]
        if not warm and count == counts[-1]:
            then(number)
    return [
        Paced(
            count,
            # The mean, since what router and client take of the cores comes in bursts.
            statistics.fmean(gaps),
            spread(gaps),
        )
        for count, gaps in means.items()
    ]


def spread(gaps: Sequence[float]) -> float:
    """The deviation of the gaps' logarithms. Answers whose tokens came to the client all at once,
    with gaps of 0, say nothing."""
    logs = [math.log(gap) for gap in gaps if gap > 0]
    return statistics.stdev(logs) if len(logs) > 1 else 0.0


def _churn(cluster: Cluster, args: argparse.Namespace, number: int) -> Run:
    """Answers of different lengths, so that they begin and end at all times."""
    at_once = min(CHURN, args.max_num_seqs)
    shape = Shape(kind="random", requests=4 * at_once, input_len=LENGTH, output_len=CHURN_ANSWER,
                  vocab=(10, args.vocab), seed=3 + number)  # fmt: skip
    return _ask(cluster, args, shape, at_once, f"churn-{number}")


def lost_s(runs: Sequence[Run], alone: StepTimes, beside: StepTimes, prompt_s: float) -> float:
    """What a request costs those whose answers are written at the same time, but for what its
    prompt costs them, computed in `prompt_s` elsewhere."""
    found = [_lost_s(run, alone, beside, prompt_s) for run in runs]
    return max(0.0, statistics.fmean(found))


def _lost_s(run: Run, alone: StepTimes, beside: StepTimes, prompt_s: float) -> float:
    edges = sorted(
        edge
        for record in run.records
        for edge in ((record.token_times[0], 1), (record.token_times[-1], -1))
    )
    moments = [moment for moment, _ in edges]
    writing = list(itertools.accumulate(change for _, change in edges))
    lost, slower = 0.0, []
    for record in run.records:
        for token, (before, after) in enumerate(itertools.pairwise(record.token_times[1:]), 2):
            # None where an answer's last tokens have come at once.
            n = max(1, writing[bisect.bisect_right(moments, before) - 1])
            context = n * (LENGTH + token)  # as if the others were as far
            usual = alone.decode_s(n, context)
            lost += (after - before - usual) / n
            slower.append(beside.decode_s(n, context) / usual - 1)
    known = statistics.fmean(slower) * prompt_s
    return lost / len(run.records) - known


def _busy_prompt_s(cluster: Cluster, args: argparse.Namespace) -> float:
    """A worker's time for a prompt of the longest of LENGTHS while no worker is ever idle."""
    shape = Shape(kind="fixed", requests=PROBES * args.workers, input_len=LENGTHS[-1], output_len=1,
                  vocab=(10, args.vocab), seed=2)  # fmt: skip
    wall_s = _ask(cluster, args, shape, 3 * args.workers, "busy").wall_s
    return wall_s / PROBES


@dataclass(frozen=True, slots=True)
class Lone:
    """Medians over requests that came one by one."""

    length: int
    prompt_s: float
    """From the step that began its prompt to its first token, in the worker."""
    front_s: float
    """What the client waited longer than that."""
    gap_s: float
    """From its first to its second token."""


def _lone(cluster: Cluster, args: argparse.Namespace, length: int) -> Lone:
    shape = Shape(kind="fixed", requests=PROBES, input_len=length, output_len=2,
                  vocab=(10, args.vocab))  # fmt: skip
    _ask(cluster, args, dataclasses.replace(shape, requests=4, seed=1), 1, "warm")
    run = _ask(cluster, args, shape, 1, f"alone-{length}")
    spent = [phases_of(record.timings or {})["prefill"] for record in run.records]
    return Lone(
        length,
        statistics.median(spent),
        statistics.median(r.ttft - s for r, s in zip(run.records, spent, strict=True)),
        statistics.median(record.gaps[0] for record in run.records),
    )


def text(profile: Profile) -> str:
    """What was found, for people."""
    length = min(512, profile.max_num_batched_tokens)

    def steps(times: StepTimes) -> str:
        counts = "; ".join(
            f"a step of {count} tokens {times.decode_s(count, count * 256) * 1e3:.1f} ms"
            for count in (1, 8, 32)
        )
        prompt_ms = profile.prompt_s(length, times) * 1e3
        beside = f"{times.share:.0%} of that beside prompts"
        return f"a prompt of {length} tokens {prompt_ms:.1f} ms; {counts}, {beside}"

    rows = [
        f"{profile.model}, {profile.dtype} on {profile.device}: {profile.kv_tokens} tokens of KV "
        "per worker",
        f"a worker alone: {steps(profile.alone)}",
        f"all {profile.workers} of them busy: {steps(profile.beside)}",
        f"around a request {profile.front_s * 1e3:.1f} ms; a hand-over of {length} tokens "
        f"{profile.transfer_s(length) * 1e3:.1f} ms; it costs those beside it "
        f"{profile.request_s * 1e3:.1f} ms; equal answers differ by {profile.jitter:.0%} in pace",
        "mean error of the fits: "
        + ", ".join(f"{name} {error:.0%}" for name, error in profile.errors.items()),
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
